// The pybind11 module over the CPU kernels.
#include "bindings.h"

#include <string>

#include "cpu/ops.h"

namespace py = pybind11;
using namespace rlhf_fast;

namespace {

template <class Struct, int64_t (*KernelTable::*kernel)(const Struct&)>
struct CpuKernel {
  using Args = Struct;
  static int64_t run(const Args& args) { return (active_isa()->kernels->*kernel)(args); }
  static PyObject* result(PyObject*, int64_t refused) { return PyLong_FromLongLong(refused); }
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of rlhf_fast";
  m.attr("ABI") = kAbi;
  m.attr("MATMUL_FLOATS") = kMatmulFloats;
  m.def("isa", [] { return active_isa()->name; }, "Name of the instruction set in use");
  m.def(
      "isas",
      [] {
        int count;
        const Isa* rows = isas(&count);
        py::list list;
        for (int i = 0; i < count; ++i) list.append(py::make_tuple(rows[i].name, rows[i].supported));
        return list;
      },
      "[(name, supported by this processor)], best first");
  m.def(
      "select_isa",
      [](const std::string& name) {
        if (select_isa(name.c_str())) return;
        int count;
        const Isa* rows = isas(&count);
        std::string known, usable;
        bool exists = false;
        for (int i = 0; i < count; ++i) {
          known += std::string(i ? ", " : "") + rows[i].name;
          if (rows[i].supported) usable += std::string(usable.empty() ? "" : ", ") + rows[i].name;
          exists |= name == rows[i].name;
        }
        if (exists) throw py::value_error("this processor lacks " + name + "; it has " + usable);
        throw py::value_error("unknown instruction set '" + name + "', expected one of " + known);
      },
      "Force one instruction set by name");
#define RLHF_FAST_BIND(name, Args) bind<CpuKernel<Args, &KernelTable::name>>(m, #name);
  RLHF_FAST_KERNELS(RLHF_FAST_BIND)
#undef RLHF_FAST_BIND
}
