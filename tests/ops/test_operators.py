"""What holds for every operator. A new one is found by its folder, and called with the arguments of samples/NAME.py."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import bkd_fast.ops
from bkd_fast.ops import DeformConv2d, backend, modulated_deform_conv2d
from bkd_fast.ops.backend import _folders, operators
from bkd_fast.ops.registration import OPERATORS

HERE = Path(__file__).parent
FOLDERS = {name: _folders[name].rpartition(".")[2] for name in operators() if not name.endswith("_backward")}
NAMES = sorted(FOLDERS)
WITH_GRADIENT = [name for name in NAMES if f"{name}_backward" in OPERATORS]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def sample(name, dtype=torch.float32, grad=False, layout=torch.contiguous_format):
    """Arguments of a call of an operator."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        value = torch.randn(shape, generator=generator).to(dtype)
        return (value.contiguous(memory_format=layout) if len(shape) == 4 else value).requires_grad_(grad)

    sys.path.insert(0, str(HERE))
    try:
        return importlib.import_module(f"samples.{FOLDERS[name]}").arguments(random)
    finally:
        sys.path.remove(str(HERE))


def overload(name):
    return getattr(torch.ops.bkd_fast, name).default


def tensors(arguments):
    flat = [part for value in arguments for part in (value if isinstance(value, list) else [value])]
    return [value for value in flat if isinstance(value, torch.Tensor) and value.is_floating_point()]


def first(output):
    return output[0] if isinstance(output, tuple) else output


def of_tensors(name, arguments):
    """The operator as a function of its floating-point tensors."""

    def call(*given):
        rest = iter(given)

        def replaced(value):
            if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
                return [next(rest) for _ in value]
            return next(rest) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return first(overload(name)(*[replaced(value) for value in arguments]))

    return call


@pytest.mark.parametrize("folder", sorted(set(FOLDERS.values())))
def test_every_folder_has_the_same_files(folder):
    files = {path.name for path in (Path(bkd_fast.ops.__file__).parent / folder).glob("*.py")}
    assert files >= {"__init__.py", "reference.py", "cpu.py", "cuda.py", "triton.py"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(name, grad, layout):
    torch.library.opcheck(overload(name), sample(name, grad=grad, layout=layout), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_gradients_are_derivatives(name):
    arguments = sample(name, torch.float64, grad=True)
    assert torch.autograd.gradcheck(of_tensors(name, arguments), tensors(arguments), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backends_agree_with_the_reference(name, layout):
    arguments = sample(name, torch.float64, layout=layout)
    result = overload(name)(*arguments)
    with backend("reference"):
        expected = overload(name)(*arguments)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks_forward_and_backward(name):
    arguments = sample(name, grad=name in WITH_GRADIENT)
    function, inputs = of_tensors(name, arguments), tensors(arguments)
    torch.compiler.reset()  # or each operator would count as a recompilation of the one before
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    output, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(output, expected)
    if name in WITH_GRADIENT:
        grads = [torch.autograd.grad(value.sum(), inputs) for value in (output, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_GRADIENT])
def test_a_gradient_is_refused(name):
    arguments = sample(name)
    (input, *others) = tensors(arguments)
    output = of_tensors(name, arguments)(input.requires_grad_(), *others)
    output = output[0] if isinstance(output, list) else output
    if not output.is_floating_point():
        pytest.skip("its results are indices")
    with pytest.raises(RuntimeError, match=f"{name} has no gradient.* torch.no_grad"):
        output.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_exports_as_one_call(name):
    arguments = sample(name)
    function, inputs = of_tensors(name, arguments), tuple(tensors(arguments))

    class Module(torch.nn.Module):
        def forward(self, *given):
            return function(*given)

    program = torch.export.export(Module(), inputs)
    assert any(node.target is overload(name) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), function(*inputs))


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_only_gradients_that_are_needed_are_computed(name):
    arguments = sample(name)
    (input, *others) = tensors(arguments)
    output = of_tensors(name, arguments)(input.requires_grad_(), *others)
    needs = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is overload(f"{name}_backward"):
                needs.extend(args[-1])
            return function(*args, **(kwargs or {}))

    with Recorder():
        output.sum().backward()
    assert needs[0]
    assert not any(needs[1:])


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_second_derivatives_are_refused(name):
    arguments = sample(name, grad=True)
    (grad, *_) = torch.autograd.grad(
        of_tensors(name, arguments)(*tensors(arguments)).square().sum(), tensors(arguments), create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_is_refused(name, grad):
    arguments = sample(name)
    call, (input, *others) = of_tensors(name, arguments), tensors(arguments)
    input = input.requires_grad_(grad)
    message = f"{name} has no forward-mode derivative"
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        call(forward_ad.make_dual(input, torch.ones_like(input)), *others)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda value: call(value, *others), (input.detach(),), (torch.ones_like(input),))
    call(input, *others)  # and nothing is left of it


@pytest.mark.parametrize("name", NAMES)
def test_low_level_calls_are_checked_like_the_functions(name):
    """Real and fake tensors, forward and backward."""
    arguments = sample(name)
    wrong = [value.to(torch.int32) if isinstance(value, torch.Tensor) else value for value in arguments]
    wrong = [[part.int() for part in v] if isinstance(v, list) and isinstance(v[0], torch.Tensor) else v for v in wrong]
    message = f"{name}: .* is torch.int32, expected"
    with pytest.raises(TypeError, match=message):
        overload(name)(*wrong)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(TypeError, match=message):
        overload(name)(*wrong)
    if name in WITH_GRADIENT:
        output = overload(name)(*arguments)
        kept = output[1:] if isinstance(output, tuple) else ()
        backward = overload(f"{name}_backward")
        flat = [part for value in arguments for part in (value if isinstance(value, list) else [value])]
        grad, needs = first(output), [True] * sum(v is None or isinstance(v, torch.Tensor) for v in flat)
        assert len(backward(grad, *kept, *arguments, needs)) == len(needs)
        with pytest.raises(ValueError, match=f"{name}_backward: grad has shape .*, expected"):
            backward(grad.new_zeros(3, 1, 2), *kept, *arguments, needs)
        with pytest.raises(ValueError, match=f"{name}_backward: needs has 99 values, expected {len(needs)}"):
            backward(grad, *kept, *arguments, [True] * 99)
        with pytest.raises(TypeError, match=f"{name}_backward: grad is torch.float64, expected torch.float32"):
            backward(grad.double(), *kept, *arguments, needs)


def test_the_same_message_from_function_and_operator():
    x, offset, weight = torch.zeros(1, 4, 5, 5), torch.zeros(1, 18, 5, 5), torch.zeros(2, 4, 3, 3)
    with pytest.raises(ValueError, match="offset has shape") as public:
        modulated_deform_conv2d(x, offset, weight)
    with pytest.raises(ValueError, match=re.escape(str(public.value))):
        overload("modulated_deform_conv2d")(x, offset, weight, None, [1, 1], [0, 0], [1, 1], None)


def test_sizes_beyond_what_kernels_index_are_refused():
    x, weight = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 1, 1)
    wide = torch.zeros(()).expand(1, 1, 2**17, 2**17)
    with pytest.raises(ValueError, match="the input is 131072 x 131072, which kernels cannot index: expected at most"):
        modulated_deform_conv2d(wide, torch.zeros(()).expand(1, 2, 2**17, 2**17), weight)
    with pytest.raises(ValueError, match="padding is 9223372036854775807, which kernels cannot index"):
        modulated_deform_conv2d(x, torch.zeros(1, 2, 4, 4), weight, padding=2**63 - 1)
    with pytest.raises(ValueError, match="size is 65536 x 65536, which kernels cannot index"):
        bkd_fast.ops.cosine_anomaly_map([x], [x], 2**16)
    with pytest.raises(ValueError, match="the number of queries is 4294967296, which kernels cannot index"):
        bkd_fast.ops.sparse_memory_attention(torch.zeros(()).expand(2**32, 4), torch.zeros(3, 4), 0.1)
    with pytest.raises(ValueError, match="sigma is 1e\\+300, expected a number of pixels from 0 to 65536"):
        bkd_fast.ops.cosine_anomaly_map([x], [x], 4, sigma=1e300)


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_wrong_calls_never_end_the_process(count, each_backend):
    command = [sys.executable, str(HERE / "wrong_calls.py"), str(count), each_backend]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    returned, raised = (int(number) for number in done.stdout.split())
    assert returned + raised == count
    assert raised > count / 2
    assert returned  # arguments that are right after all


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_module_equals_the_eager_one(mask, tmp_path):
    module = DeformConv2d(4, 6, (3, 1), stride=2, padding=(1, 0), groups=2).double()
    x, offset = torch.randn(2, 4, 8, 6).double(), torch.randn(2, 6, 4, 3).double()
    arguments = (x, offset, torch.rand(2, 3, 4, 3).double()) if mask else (x, offset)
    scripted = torch.jit.script(module)
    assert torch.equal(scripted(*arguments), module(*arguments))
    torch.jit.save(scripted, str(tmp_path / "module.pt"))
    assert torch.equal(torch.jit.load(str(tmp_path / "module.pt"))(*arguments), module(*arguments))


def test_offsets_that_are_not_numbers_give_results_that_are_none():
    """Where torchvision converts them to integers, which is undefined; here nothing outside the image is read."""
    x, weight = torch.randn(1, 3, 6, 6).double(), torch.randn(2, 3, 3, 3).double()
    offset = torch.zeros(1, 18, 6, 6).double().requires_grad_()
    clean = modulated_deform_conv2d(x, offset, weight, padding=1)
    wrong = offset.detach().clone()
    wrong[0, 7, 2, 3] = float("nan")
    wrong.requires_grad_()
    output = modulated_deform_conv2d(x, wrong, weight, padding=1)
    expected = clean.detach().clone()
    expected[0, :, 2, 3] = float("nan")
    torch.testing.assert_close(output, expected, equal_nan=True)
    output.nansum().backward()
    assert wrong.grad.shape == offset.shape
