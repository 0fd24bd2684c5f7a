"""The evaluation's commands: `python -m llamafactory_ext.evaluation gsm8k --help`.

Also runs by its path, `python .../llamafactory_ext/evaluation/__main__.py gsm8k`, with an interpreter that lacks the
package, such as that of vLLM's environment. Sweeps start it like this.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if not __package__:  # by its path, also when vLLM's workers import it again
    here = Path(__file__).resolve().parent
    # Python has put this folder on sys.path, where `models` and `options` could shadow other modules.
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
