// The schemas of the CPU kernels. The Python side (bkd_fast/ops/native/cpu.py) checks, allocates and lays out; these
// fill in what they are given: tensors named (a!), (b!) … are written to, and grad_* without elements are not needed.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(bkd_fast_native, m) {
  m.def("cpu_tiers() -> str");
  m.def(
      "deform_conv(int tier, Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, int[] stride, "
      "int[] padding, int[] dilation, Tensor(a!) output) -> ()");
  m.def(
      "deform_conv_backward(int tier, Tensor grad, Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
      "int[] stride, int[] padding, int[] dilation, Tensor(a!) grad_input, Tensor(b!) grad_offset, "
      "Tensor(c!) grad_mask, Tensor(d!) grad_weight) -> ()");
  m.def(
      "deform_gather(int tier, Tensor projected, Tensor offset, Tensor? mask, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, Tensor(a!) output) -> ()");
  m.def(
      "deform_gather_backward(int tier, Tensor grad, Tensor projected, Tensor offset, Tensor? mask, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, Tensor(a!) grad_projected, Tensor(b!) grad_offset, "
      "Tensor(c!) grad_mask) -> ()");
  m.def(
      "memory_attention(int tier, Tensor query, Tensor memory, float threshold, float temperature, bool renormalize, "
      "Tensor(a!) output) -> ()");
  m.def(
      "memory_attention_backward(int tier, Tensor grad, Tensor query, Tensor memory, float threshold, "
      "float temperature, bool renormalize, Tensor(a!) grad_query, Tensor(b!) grad_memory) -> ()");
  m.def(
      "cosine_distances(int tier, Tensor[] teacher, Tensor[] student, float[] weights, float value_share, "
      "Tensor(a!) output) -> ()");
  m.def(
      "cosine_distances_backward(int tier, Tensor grad, Tensor[] teacher, Tensor[] student, float[] weights, "
      "float value_share, Tensor(a!)[] grad_teacher, Tensor(b!)[] grad_student) -> ()");
  m.def(
      "anomaly_map(int tier, Tensor[] teacher, Tensor[] student, float[] weights, float[] exponents, float value_share, "
      "bool product, float sigma, bool align_corners, Tensor(a!) output) -> ()");
  m.def(
      "distillation_loss(int tier, Tensor[] teacher, Tensor[] student, bool by_pixel, float value_weight, "
      "Tensor(a!) statistics, Tensor(b!) output) -> ()");
  m.def(
      "distillation_loss_backward(int tier, Tensor grad, Tensor[] teacher, Tensor[] student, Tensor statistics, "
      "bool by_pixel, float value_weight, Tensor(a!)[] grad_teacher, Tensor(b!)[] grad_student) -> ()");
  m.def(
      "local_match(int tier, Tensor query, Tensor support, Tensor shots, int radius, Tensor(a!) distance, "
      "Tensor(b!) displacement) -> ()");
}

// Importing the module runs the registrations above and beside the kernels.
extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
