"""What in a step would not stay on a GPU, asked of TensorFlow's registry of kernels.

TensorFlow for Linux is built for CUDA: the kernels of GPUs are registered on machines without a GPU
too. A kernel says which of its inputs and outputs it wants in host memory. `faults` follows the
tensors of a function, and of all functions that it calls, from kernel to kernel.
"""

import functools

from tensorflow.python.framework import function_def_to_graph, kernels

PYTHON = {"EagerPyFunc", "PyFunc", "PyFuncStateless"}  # one has a kernel for GPUs; all wait
# Operations that compute in host memory beside a GPU. That costs nothing as long as no value of the
# device is among their inputs, which `faults` reports.
SHAPES = {"ConcatV2", "Const", "Identity", "Pack", "Shape", "ShapeN", "StridedSlice", "Unpack"}
COUNTERS = {  # int32 numbers of micro-batches and windows, and arithmetic with shapes
    "AddV2", "FloorDiv", "FloorMod", "Greater", "Less", "Max", "Maximum", "Mul", "Neg", "NotEqual",
    "Range", "Sub",
}  # fmt: skip
FLAGS = {"ReadVariableOp"}  # int32 variables, which TensorFlow keeps in host memory
LISTS = {"TensorListReserve"}  # makes the handle of the list that a loop fills
ON_HOST = SHAPES | COUNTERS | FLAGS | LISTS
CALLS = {"If", "StatelessIf", "While", "StatelessWhile", "PartitionedCall",
         "StatefulPartitionedCall"}  # fmt: skip
# Sums over an epoch are float64, which is slow on most GPUs; nothing else may be.
FLOAT64 = {
    "AddV2", "AssignAddVariableOp", "Cast", "ConcatV2", "Const", "Identity", "Pack", "Placeholder",
    "StridedSlice", "Sum", *CALLS,
}  # fmt: skip


def faults(function):
    """Find what keeps a GPU waiting in a function.

    Args:
        function: Concrete function, traced on any device.

    Returns:
        List of texts: operations that have no kernel for a GPU, call Python, or compute in host
        memory or in float64 without being listed above; and copies from the device to host memory,
        for which the host would wait.
    """
    library = function.graph.as_graph_def().library.function
    graphs = [function.graph, *map(function_def_to_graph.function_def_to_graph, library)]
    conditions = {
        op.get_attr("cond").name
        for graph in graphs
        for op in graph.get_operations()
        if op.type in ("While", "StatelessWhile")
    }
    found = []
    for graph in graphs:
        for op in graph.get_operations():
            found += (f"{graph.name}: {op.name} ({op.type}) {fault}" for fault in _faults_of(op))
        found += (
            f"{graph.name}: its result {output.name} is copied from the device"
            for output in graph.outputs
            if (graph.name in conditions or _passes_on_host(output)) and not _is_on_host(output)
        )
    return found


def kernel_of(op):
    """The kernel that an operation has on a GPU, or None."""
    types = ((name, (*value.list.type, value.type)) for name, value in op.node_def.attr.items())
    return _kernel(op.type, tuple((name, frozenset(t) - {0}) for name, t in types if any(t)))


@functools.cache
def _kernel(kind, types):
    """The kernel of a kind of operation, for types by attribute; one made for GPUs, if it exists.

    Kernels for DEFAULT are those of every kind of device.
    """
    types, found = dict(types), {}
    for kernel in kernels.get_registered_kernels_for_op(kind).kernel:
        is_for_types = all(
            types.get(constraint.name, frozenset()) <= set(constraint.allowed_values.list.type)
            for constraint in kernel.constraint
        )
        if is_for_types and not kernel.label:
            found[kernel.device_type] = kernel
    return found.get("GPU") or found.get("DEFAULT")


def _faults_of(op):
    kernel, types = kernel_of(op), {tensor.dtype.name for tensor in (*op.inputs, *op.outputs)}
    if op.type in PYTHON:
        yield "calls Python"
    elif kernel is None and not _is_on_host_variable(op):
        yield f"has no kernel for {', '.join(sorted(types))} on a GPU"
    if "float64" in types and op.type not in FLOAT64:
        yield "computes in float64"
    if _is_constant(op):
        return
    on_host = [t for t in op.outputs if _is_on_host(t) and t.dtype.name != "resource"]
    if on_host and op.type not in ON_HOST | CALLS | {"Placeholder"}:
        yield "computes in host memory"
    for number, tensor in enumerate(op.inputs):
        if _wants_on_host(op, number) and not _is_on_host(tensor):
            yield f"waits until {tensor.name} ({tensor.op.type}) is copied from the device"


def _wants_on_host(op, number):
    """Whether an operation wants an input in host memory."""
    if _passes_on_host(op.inputs[number]) and op.type in CALLS:
        return True
    return _is_on_host_variable(op) or number in _host_places(op, op.op_def.input_arg)


def _is_on_host(tensor):
    """Whether a tensor is in host memory, once TensorFlow has simplified the graph."""
    op = tensor.op
    if op.type == "Identity":  # is removed
        return _is_on_host(op.inputs[0])
    if op.type != "Const" and _is_constant(op):  # is replaced by its value
        return tensor.dtype.name == "int32"
    if op.type in CALLS or op.type == "Placeholder":
        return _passes_on_host(tensor)
    return _is_on_host_variable(op) or tensor.value_index in _host_places(op, op.op_def.output_arg)


def _is_constant(op):
    """Whether an operation gives the same each time."""
    return op.type == "Const" or (bool(op.inputs) and all(_is_constant(t.op) for t in op.inputs))


def _passes_on_host(tensor):
    """Whether a tensor is in host memory where a function takes or returns it."""
    return tensor.dtype.name in ("int32", "resource")


def _is_on_host_variable(op):
    """Whether an operation is on an int32 variable, which has no place on a GPU."""
    return op.type in ("ReadVariableOp", "VarHandleOp") and op.get_attr("dtype").name == "int32"


def _host_places(op, arguments):
    """Numbers of the inputs, or of the outputs, that the kernel has in host memory."""
    kernel = kernel_of(op)
    on_host = set(kernel.host_memory_arg) if kernel else ()
    places = []
    for argument in arguments:
        if argument.number_attr:
            n = op.get_attr(argument.number_attr)
        else:
            n = len(op.get_attr(argument.type_list_attr)) if argument.type_list_attr else 1
        places += [argument.name in on_host] * n
    return {number for number, is_on_host in enumerate(places) if is_on_host}
