// What the pybind11 modules share: a kernel becomes a plain C function of Python, which passes the fields of an
// argument struct by position. Nothing here knows torch: a tensor is what answers data_ptr(), and None is a null
// pointer.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

namespace rlhf_fast {
namespace {

// Converts to whatever type the struct's field has. A pointer may also come as a number: streams do.
struct Field {
  PyObject* object;

  void* address() const {
    if (object == Py_None) return nullptr;
    if (PyLong_Check(object)) return PyLong_AsVoidPtr(object);
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

// Kernel::Args is the struct, Kernel::run(args) works without the interpreter's lock, Kernel::result(name, found) makes
// Python's result of what it returned. Half the cost of a call through pybind11's dispatcher, which matters for ops on
// a few tokens.
template <class Kernel>
PyObject* call(PyObject* name, PyObject* const* values, Py_ssize_t count) {
  using Args = typename Kernel::Args;
  constexpr Py_ssize_t fields = CountFields<Args>::value;
  if (count != fields) return PyErr_Format(PyExc_TypeError, "%U: got %zd fields, expected %zd", name, count, fields);
  const Args args = fill<Args>(values, std::make_index_sequence<fields>());
  if (PyErr_Occurred()) return nullptr;
  PyThreadState* state = PyEval_SaveThread();  // other threads run meanwhile
  const int64_t found = Kernel::run(args);
  PyEval_RestoreThread(state);
  return Kernel::result(name, found);
}

template <class Kernel>
void bind(pybind11::module_& m, const char* name) {
  static PyMethodDef method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<Kernel>)),
                               METH_FASTCALL, nullptr};
  const pybind11::str self(name);
  m.attr(name) = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, self.ptr()));
}

}  // namespace
}  // namespace rlhf_fast
