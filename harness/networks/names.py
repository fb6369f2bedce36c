"""What the key `network` names, as far as that needs no TensorFlow."""

import ast
from pathlib import Path

from harness import REPOSITORY
from harness.errors import UserError


def network_names():
    """The names in NETWORKS of model.py, which imports TensorFlow and is therefore only read.

    Returns:
        List of the names; empty if the table is not written as a dictionary of texts.
    """
    tree = ast.parse((REPOSITORY / "model.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NETWORKS":
            keys = getattr(node.value, "keys", [])
            return [key.value for key in keys if isinstance(key, ast.Constant)]
    return []


def network_file(network, names):
    """The path of the model file that the key `network` names; None for the name of a network.

    Args:
        network: Value of the key.
        names: Names of the networks.

    Raises:
        UserError: If it is neither.
    """
    if network in names:
        return None
    path = Path(network)
    if path.suffix != ".keras":
        raise UserError(
            f"Unknown network '{network}'. Set network to {' or '.join(names)}, or to the path "
            "of a model file, which must end in .keras."
        )
    if not path.is_file():
        raise UserError(f"No model file {path}. Set network to the .keras file of a trained model.")
    return path
