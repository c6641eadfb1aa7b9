// The Python module; importing it runs the registrations at the end of each operator's file. The Python side allocates
// outputs and chooses layouts. Kernels write to the tensors marked (a!), (b!) …; a grad_* without elements is skipped.
#if !defined(BKD_ON_CPU)
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
