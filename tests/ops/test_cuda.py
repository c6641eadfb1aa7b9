"""What only a GPU shows of the CUDA and Triton kernels: streams, graphs, determinism, memory, compilers, agreement."""

import activation_cases
import cases
import kernel_checks
import pytest
import retrieval_cases
import torch
import wgmma_cases

from bkd_fast.ops import backend, local_match
from bkd_fast.ops.backend import available
from bkd_fast.ops.deform_conv.cuda import has_wgmma

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TYPES = [torch.float32, torch.float16, torch.bfloat16]
SOME = ["conv: groups", "gather", "attention: sparse", "anomaly", "loss: flat", "loss: pixel, channels last"]


@pytest.fixture(params=["native", "triton"], autouse=True)
def each_backend(request):
    """Overrides the suite's: the kernels of CUDA devices, without TF32."""
    missing = available(request.param)
    if missing:
        pytest.skip(missing)
    if request.param == "native":
        from bkd_fast.ops import native

        if native.without_cuda:
            pytest.fail(f"a GPU, and no CUDA kernels: {native.without_cuda}")
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("dtype", TYPES)
def test_the_kernels_agree_with_the_reference(name, dtype, each_backend):
    case = cases.rounded(cases.CASES[name](), dtype)
    exact, plain = cases.results(case, "reference", torch.float64), cases.results(case, "reference", dtype)
    results = cases.results(case, each_backend, dtype, "cuda")
    cases.check(results, [value.cpu() for value in plain], exact, cases.ROUNDING[dtype])


@pytest.mark.parametrize("name", wgmma_cases.SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wgmma_agrees_with_the_reference(name, dtype, each_backend):
    if each_backend != "native" or not has_wgmma(torch.empty(1, device="cuda")):
        pytest.skip("of native kernels with code for 9.0a on such a device")
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    case = wgmma_cases.make(name, processors)
    first, second = (wgmma_cases.check(case, dtype, "cuda") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", cases.MATCHES)
@pytest.mark.parametrize("dtype", TYPES)
def test_matching_agrees_with_the_reference(name, dtype, each_backend):
    case = cases.MATCHES[name]()
    cases.check_match(cases.matched(case, each_backend, dtype, "cuda"), case, dtype)


@pytest.mark.parametrize("name", retrieval_cases.MATCHES)
@pytest.mark.parametrize("dtype", TYPES)
def test_matched_supports_agree_with_the_reference(name, dtype, each_backend):
    for whole in (False, True):
        retrieval_cases.check_match(name, each_backend, dtype, whole, "cuda")


def test_what_retrieves_agrees_with_the_reference(each_backend):
    for name in retrieval_cases.GRIDS:
        for last in (True, False):
            retrieval_cases.check_grid(name, each_backend, last=last, device="cuda")
    for name in retrieval_cases.RESIDUALS:
        retrieval_cases.check_residual(name, each_backend, device="cuda")
    retrieval_cases.check_row_of_the_bank(each_backend, "cuda")


@pytest.mark.parametrize("chosen", ["own", "reference"])
def test_supports_and_neighbors_that_do_not_exist_are_not_read(chosen, each_backend):
    chosen = each_backend if chosen == "own" else chosen
    retrieval_cases.check_missing_shots(chosen, "cuda")
    retrieval_cases.check_missing_neighbors(chosen, "cuda")


@pytest.mark.parametrize("shape", activation_cases.SHAPES)
@pytest.mark.parametrize("layout", activation_cases.LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_bias_and_activation_equal_the_reference(shape, layout, dtype, each_backend):
    activation_cases.check(shape, layout, each_backend, dtype, "cuda")


def test_bias_and_activation_of_views_and_of_what_is_not_a_number(each_backend):
    activation_cases.check_views(each_backend, "cuda")
    activation_cases.check_not_a_number(each_backend, "cuda")


@pytest.mark.parametrize("chosen", ["own", "reference"])
def test_a_shot_that_is_no_image_is_not_read(chosen, each_backend):
    kernel_checks.a_shot_that_is_no_image_is_not_read(each_backend if chosen == "own" else chosen, "cuda")


def test_matching_is_captured_compiled_and_as_pytorch_wants_it(each_backend):
    case = cases.match()
    arguments = [*(tensor.cuda() for tensor in case[:3]), case.radius]
    call = torch.ops.bkd_fast.local_match.default
    with backend(each_backend):
        expected = call(*arguments)
        matches = torch.compile(lambda q, s, n: local_match(q, s, n, 1), fullgraph=True)(*arguments[:3])
        torch.library.opcheck(call, tuple(arguments))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(*arguments)
    torch.testing.assert_close(matches, expected)
    arguments[2].copy_(arguments[2].flip(0))
    graph.replay()
    with backend(each_backend):
        torch.testing.assert_close(captured, call(*arguments))
    assert not torch.equal(captured[0], expected[0])


@pytest.mark.parametrize("number", range(4))
def test_matching_agrees_in_every_configuration(number, each_backend, monkeypatch):
    if each_backend != "triton":
        pytest.skip("of Triton's kernels")
    _use_configuration(number, monkeypatch)
    case = cases.match(channels=70, size=(16, 33))
    cases.check_match(cases.matched(case, "triton", torch.bfloat16, "cuda"), case, torch.bfloat16)


@pytest.mark.parametrize("name", SOME)
def test_a_graph_of_it_can_be_captured_and_replayed(name, each_backend):
    """Nothing waits for the device, and everything runs on the current stream."""
    call, tensors = cases.CASES[name]()
    inputs = [tensor.cuda().half() for tensor in tensors]
    with backend(each_backend):
        expected = call(*inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(*inputs)
    for value in inputs:
        value.mul_(2)
    graph.replay()
    with backend(each_backend):
        torch.testing.assert_close(captured, call(*inputs))
    assert not torch.equal(captured, expected)


@pytest.mark.parametrize("name", SOME)
def test_work_is_ordered_by_the_current_stream(name, each_backend):
    """A kernel on another stream would read what is not yet there."""
    call, tensors = cases.CASES[name]()
    with backend(each_backend):
        expected = call(*[tensor.cuda() for tensor in tensors])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            inputs = [torch.zeros_like(tensor, device="cuda") for tensor in tensors]
            torch.cuda._sleep(50_000_000)
            for value, tensor in zip(inputs, tensors, strict=True):
                value.copy_(tensor)
            output = call(*inputs)
        stream.synchronize()
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", cases.CASES)
def test_the_same_bits_twice_where_they_are_asked_for(name, each_backend):
    case = cases.CASES[name]()
    with cases.deterministic(warn_only=True):
        first, second = (cases.results(case, each_backend, torch.float32, "cuda") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_convolution_holds_no_columns(each_backend):
    call, tensors = cases.conv(4, 256, 256, (64, 64), mask=True)
    inputs = [tensor.cuda().half() for tensor in tensors]
    with backend(each_backend):
        call(*inputs)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = call(*inputs)
    # The result and the weights in the kernel's order; columns would be nine times the input.
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 2 * output.numel() * output.element_size() + 2**21


def test_tensors_of_more_than_two_billion_numbers(each_backend):
    free = torch.cuda.mem_get_info()[0]
    if free < 40 * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GB of GPU memory are free, 40 are needed")
    batch, channels, size = 40, 4096, 128  # 2.7e9 numbers
    input = torch.zeros(batch, channels, size, size, dtype=torch.half, device="cuda").to(
        memory_format=torch.channels_last
    )
    input[-1] = 1
    offset = torch.zeros(batch, 2, size, size, dtype=torch.half, device="cuda")
    weight = torch.full((8, channels, 1, 1), 2.0**-10, dtype=torch.half, device="cuda")
    from bkd_fast.ops import modulated_deform_conv2d

    with backend(each_backend):
        output = modulated_deform_conv2d(input, offset, weight)
    assert (output[-1] == channels * 2.0**-10).all()
    assert not output[:-1].any()


@pytest.mark.parametrize("name", SOME)
def test_compiled_programs_agree(name, each_backend):
    """Triton's kernels become a part of the program, those of CUDA C++ are called by it."""
    call, tensors = cases.CASES[name]()
    leaves = [tensor.cuda().requires_grad_() for tensor in tensors]
    with backend(each_backend):
        expected = call(*leaves)
        output = torch.compile(call, fullgraph=True)(*leaves)
        torch.testing.assert_close(output, expected)
        grads = [torch.autograd.grad(value.sum(), leaves) for value in (output, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", SOME)
def test_operators_are_as_pytorch_wants_them(name, each_backend):
    call, tensors = cases.CASES[name]()
    leaves = [tensor.cuda().requires_grad_() for tensor in tensors]
    for function, arguments in cases.recorded(call, leaves, each_backend):
        with backend(each_backend):
            torch.library.opcheck(function, arguments)


@pytest.mark.parametrize("name", SOME)
def test_every_configuration_agrees(name, each_backend, monkeypatch):
    """Tuning may choose any of them."""
    if each_backend != "triton":
        pytest.skip("of Triton's kernels")
    case = cases.rounded(cases.CASES[name](), torch.bfloat16)
    exact, plain = (cases.results(case, "reference", dtype) for dtype in (torch.float64, torch.bfloat16))
    for number in range(4):
        _use_configuration(number, monkeypatch)
        results = cases.results(case, "triton", torch.bfloat16, "cuda")
        cases.check(results, plain, exact, cases.ROUNDING[torch.bfloat16])


def _use_configuration(number, monkeypatch):
    """Triton's kernels run in their configuration of a number, or in their last one."""
    import triton

    from bkd_fast.ops import triton_common

    def one(tuned, kind="any"):
        configs = tuned.kinds[kind]
        return triton.autotune([configs[min(number, len(configs) - 1)]], key=[])(tuned.kernel)

    monkeypatch.setattr(triton_common.Tuned, "__call__", one)
