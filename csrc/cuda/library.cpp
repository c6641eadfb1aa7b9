// The Python module; importing it runs the registrations at the end of each operator's file. The Python side
// allocates and lays out; the kernels fill in what they are given: tensors named (a!), (b!) … are written to, and grad_*
// without elements are not needed.
#if !defined(BKD_ON_CPU)
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
