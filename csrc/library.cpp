// The Python module; importing it runs the registrations at the end of each operator's file. The Python side
// allocates and lays out; the kernels fill in what they are given: tensors named (a!), (b!) … are written to, and grad_*
// without elements are not needed.
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
