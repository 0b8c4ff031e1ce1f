"""fastdcgan: fused kernels that make the convolutional GAN family train fast, behind drop-in layers."""

from fastdcgan import backends, functional, optim
from fastdcgan.backends import backend
from fastdcgan.explain import explain
from fastdcgan.folding import fold_batchnorm
from fastdcgan.fuse import fuse, unfuse
from fastdcgan.layers import (
    ConvAct2d,
    ConvBNAct2d,
    ConvBNLeakyReLU2d,
    ConvLeakyReLU2d,
    ConvTransposeAct2d,
    ConvTransposeBNAct2d,
    ConvTransposeBNReLU2d,
    ConvTransposeTanh2d,
    FusedSequential,
)
from fastdcgan.spec import Unavailable
from fastdcgan.version import __version__

__all__ = [
    "ConvAct2d",
    "ConvBNAct2d",
    "ConvBNLeakyReLU2d",
    "ConvLeakyReLU2d",
    "ConvTransposeAct2d",
    "ConvTransposeBNAct2d",
    "ConvTransposeBNReLU2d",
    "ConvTransposeTanh2d",
    "Discriminator",
    "FusedSequential",
    "GANStep",
    "Generator",
    "Unavailable",
    "__version__",
    "backend",
    "backends",
    "explain",
    "fold_batchnorm",
    "functional",
    "fuse",
    "optim",
    "unfuse",
]


def __getattr__(name: str) -> object:
    if name in ("Generator", "Discriminator"):  # a user of the layers alone never loads dcgan/
        from fastdcgan.dcgan import models

        return getattr(models, name)
    if name == "GANStep":
        from fastdcgan.gan_step import GANStep

        return GANStep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
