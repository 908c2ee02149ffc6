// The pybind11 module over the native core. Python passes the fields of an argument struct by position: tensors, sizes
// and numbers. Nothing here knows torch: a tensor is what answers data_ptr(), and None is a null pointer.
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

  void* address() const {
    if (object == Py_None) return nullptr;
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* number = PyObject_CallMethodNoArgs(object, data_ptr);
    if (!number) return nullptr;  // the error stays set
    void* found = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    return found;
  }

  template <class T>
  operator T() const {
    if constexpr (std::is_pointer_v<T>) {
      return static_cast<T>(address());
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
Args fill(PyObject* const* values, std::index_sequence<I...>) {
  return Args{Field{values[I]}...};
}

// One kernel as a plain C function of Python: half the cost of a call through pybind11's dispatcher, which matters for
// ops on a few tokens.
template <class Args, int64_t (*KernelTable::*kernel)(const Args&)>
PyObject* call(PyObject* name, PyObject* const* values, Py_ssize_t count) {
  constexpr Py_ssize_t fields = CountFields<Args>::value;
  if (count != fields) return PyErr_Format(PyExc_TypeError, "%U: got %zd fields, expected %zd", name, count, fields);
  const Args args = fill<Args>(values, std::make_index_sequence<fields>());
  if (PyErr_Occurred()) return nullptr;
  const auto run = active_isa()->kernels->*kernel;
  PyThreadState* state = PyEval_SaveThread();  // other threads run meanwhile
  const int64_t refused = run(args);
  PyEval_RestoreThread(state);
  return PyLong_FromLongLong(refused);
}

template <class Args, int64_t (*KernelTable::*kernel)(const Args&)>
void bind(py::module_& m, const char* name) {
  static PyMethodDef method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<Args, kernel>)),
                               METH_FASTCALL, nullptr};
  const py::str self(name);
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_New(&method, self.ptr()));
}

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
#define RLHF_FAST_BIND(name, Args) bind<Args, &KernelTable::name>(m, #name);
  RLHF_FAST_KERNELS(RLHF_FAST_BIND)
#undef RLHF_FAST_BIND
}
