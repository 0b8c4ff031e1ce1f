// torch.ops.fastdcgan_cuda, what it says of its kernels: schema and registration.
#include "cuda/ops/facts.h"
#include "cuda/ops/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(FASTDCGAN_NAMESPACE, m) { m.def("facts() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(FASTDCGAN_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("facts", TORCH_BOX(&fastdcgan::cuda::facts_op));
}
