// The pybind11 module over the native core. Python passes the fields of an argument struct by position: addresses,
// sizes and numbers. Nothing here knows torch.
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "cpu/ops.h"

namespace py = pybind11;
using namespace rlhf_fast;

namespace {

// Converts to whatever type the struct's field has.
struct Field {
  PyObject* object;

  template <class T>
  operator T() const {
    if constexpr (std::is_pointer_v<T>) {
      return static_cast<T>(PyLong_AsVoidPtr(object));
    } else if constexpr (std::is_same_v<T, bool>) {
      return PyObject_IsTrue(object) == 1;
    } else if constexpr (std::is_floating_point_v<T>) {
      return static_cast<T>(PyFloat_AsDouble(object));
    } else {
      return static_cast<T>(PyLong_AsLongLong(object));
    }
  }
};

template <class T, class = void, class... F>
struct CountFields : std::integral_constant<size_t, sizeof...(F) - 1> {};
template <class T, class... F>
struct CountFields<T, std::void_t<decltype(T{std::declval<F>()...})>, F...> : CountFields<T, void, F..., Field> {};

template <class Args, size_t... I>
Args fill(const py::args& values, std::index_sequence<I...>) {
  Args args{Field{PyTuple_GET_ITEM(values.ptr(), I)}...};
  if (PyErr_Occurred()) throw py::error_already_set();
  return args;
}

template <class Args>
void bind(py::module_& m, const char* name, int64_t (*KernelTable::*kernel)(const Args&)) {
  constexpr size_t fields = CountFields<Args>::value;
  m.def(name, [name, kernel](const py::args& values) {
    if (values.size() != fields)
      throw py::type_error(std::string(name) + ": got " + std::to_string(values.size()) + " fields, expected " +
                           std::to_string(fields));
    const Args args = fill<Args>(values, std::make_index_sequence<fields>());
    py::gil_scoped_release release;
    return (active_isa()->kernels->*kernel)(args);
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of rlhf_fast";
  m.attr("ABI") = kAbi;
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
#define RLHF_FAST_BIND(name, Args) bind<Args>(m, #name, &KernelTable::name);
  RLHF_FAST_KERNELS(RLHF_FAST_BIND)
#undef RLHF_FAST_BIND
}
