"""The evaluation's commands: `python -m llamafactory_ext.evaluation gsm8k --help`.

Also as a file, `python .../llamafactory_ext/evaluation/__main__.py gsm8k`, for an interpreter that does not have the
package, such as that of vLLM's environment, in which sweeps start it.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if not __package__:  # as a file, also where vLLM's workers import it again
    here = Path(__file__).resolve().parent
    # Python has put this folder on the path, where `models` and `options` would be anybody's.
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]
    if "llamafactory_ext" not in sys.modules:
        init = here.parent / "__init__.py"
        spec = spec_from_file_location("llamafactory_ext", init, submodule_search_locations=[str(init.parent)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules["llamafactory_ext"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["llamafactory_ext"])

from llamafactory_ext.evaluation.commands import app

if __name__ == "__main__":
    app(prog_name="llamafactory-ext eval")
