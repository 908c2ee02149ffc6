// The pybind11 module over the CUDA launchers: one per CUDA major, RLHF_FAST_CUDA_MODULE names it.
#include <string>

#include "bindings.h"
#include "cuda/driver.h"
#include "cuda/images.h"
#include "cuda/ops.h"

namespace py = pybind11;
using namespace rlhf_fast;

namespace {

template <class Struct, int64_t (*launcher)(const Struct&)>
struct CudaKernel {
  using Args = Struct;
  static int64_t run(const Args& args) { return launcher(args); }
  static PyObject* result(PyObject* name, int64_t code) {
    if (code == 0) Py_RETURN_NONE;
    return PyErr_Format(PyExc_RuntimeError, "rlhf_fast: CUDA kernel '%U': %s", name,
                        cuda::error_text(static_cast<int>(code)));
  }
};

void define(py::module_& m) {
  m.doc() = "CUDA kernels of rlhf_fast";
  m.attr("ABI") = cuda::kAbi;
  m.attr("TOOLKIT") = py::str(cuda::kToolkit);
  m.attr("ARCHES") = py::str(cuda::kArchList).attr("split")();
  m.def(
      "check",
      []() -> py::object {
        const int code = cuda::check();
        if (code == 0) return py::none();
        return py::str(cuda::error_text(code));
      },
      "Why no kernel can be launched on the current device, or None; opens the driver");
#define RLHF_FAST_BIND(name, Args) bind<CudaKernel<cuda::Args, &cuda::name>>(m, #name);
  RLHF_FAST_CUDA_KERNELS(RLHF_FAST_BIND)
#undef RLHF_FAST_BIND
}

}  // namespace

#define RLHF_FAST_DEFINE(module) \
  PYBIND11_MODULE(module, m) { define(m); }
RLHF_FAST_DEFINE(RLHF_FAST_CUDA_MODULE)
