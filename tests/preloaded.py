"""What processes of tests are forked with: PyTorch and transformers, what Inductor finds out once, and nothing of ours."""

import sympy.tensor.tensor  # noqa: F401
import torch.distributed.fsdp
import torch.export._trace
import torch.utils.cpp_extension
import transformers  # noqa: F401
from torch._inductor import compile_fx  # noqa: F401
from torch._inductor.codecache import CacheBase, torch_key
from torch._inductor.codegen.common import init_backend_registration
from torch._inductor.fx_passes import joint_graph, post_grad

CacheBase.get_system()
torch_key()
init_backend_registration()
joint_graph.lazy_init(torch.device("cpu"))
post_grad.lazy_init()
