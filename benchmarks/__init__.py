"""The benchmark suite: what `fastdcgan bench` and `gpu_check.py` run. NOTES.md has the method."""
