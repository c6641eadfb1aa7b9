// The one list of what runs on CUDA. The Python side (bkd_fast/ops/native/cuda) checks, allocates and lays out; these
// fill in what they are given: tensors named (a!), (b!) … are written to, and grad_* without elements are not
// needed.
#if !defined(BKD_ON_CPU)
#include <Python.h>
#endif

#include "bindings.h"

BKD_DEFINITIONS(m) {
  m.def(
      "deform_conv(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, int[] stride, int[] "
      "padding, "
      "int[] dilation, int offset_groups, bool tf32, Tensor(a!) output) -> ()");
  m.def(
      "deform_conv_backward(Tensor grad, Tensor input, Tensor offset, Tensor? mask, Tensor weight, int[] stride, "
      "int[] padding, int[] dilation, int offset_groups, bool tf32, Tensor(a!) grad_input, Tensor? scale, "
      "Tensor(b!) grad_offset, Tensor(c!) grad_mask) -> ()");
  m.def(
      "deform_conv_weight(Tensor grad, Tensor input, Tensor offset, Tensor? mask, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int offset_groups, bool tf32, Tensor(a!) grad_weight) -> ()");
  m.def(
      "deform_gather(Tensor projected, Tensor offset, Tensor? mask, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, Tensor(a!) output) -> ()");
  m.def(
      "deform_gather_backward(Tensor grad, Tensor projected, Tensor offset, Tensor? mask, int[] kernel_size, int[] "
      "stride, "
      "int[] padding, int[] dilation, Tensor(a!) grad_projected, Tensor? scale, Tensor(b!) grad_offset, "
      "Tensor(c!) grad_mask) -> ()");
  m.def(
      "memory_attention(Tensor(a!) dots, Tensor memory, Tensor query_norms, Tensor memory_norms, float threshold, "
      "float temperature, bool renormalize, bool tf32, Tensor(b!) kept, Tensor(c!) counts, Tensor(d!) output) -> ()");
  m.def(
      "memory_attention_gradient(Tensor query_norms, Tensor memory_norms, float threshold, float temperature, "
      "bool renormalize, Tensor(a!) dots, Tensor(b!) by_read, Tensor(c!) pull) -> ()");
  m.def(
      "cosine_distances(Tensor[] teacher, Tensor[] student, float[] weights, float value_share, int[] channels, "
      "Tensor(a!)[] output, Tensor(b!)[] statistics) -> ()");
  m.def(
      "cosine_distances_backward(Tensor[] grad, Tensor[] teacher, Tensor[] student, float[] weights, float "
      "value_share, "
      "int[] channels, Tensor[] statistics, Tensor(a!)[] grad_teacher, Tensor(b!)[] grad_student) -> ()");
  m.def(
      "anomaly_map(Tensor[] distances, bool product, float sigma, int radius, bool align_corners, Tensor(a!) rows, "
      "Tensor(b!) output) -> ()");
  m.def(
      "distillation_loss(Tensor[] teacher, Tensor[] student, int[] channels, bool by_image, float value_weight, int "
      "splits, "
      "Tensor(a!)[] statistics, Tensor(b!)[] parts, Tensor(c!) output) -> ()");
  m.def(
      "distillation_loss_backward(Tensor grad, Tensor[] teacher, Tensor[] student, int[] channels, bool by_image, "
      "float value_weight, Tensor[] statistics, Tensor(a!)[] grad_teacher, Tensor(b!)[] grad_student) -> ()");
  m.def(
      "local_match(Tensor query, Tensor support, Tensor shots, int channels, int radius, Tensor(a!) distance, "
      "Tensor(b!) displacement) -> ()");
}

#if !defined(BKD_ON_CPU)
// Importing the module runs the registrations above and beside the bindings.
extern "C" PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
