"""What the engines are compared with: every loss trained by one process."""

from __future__ import annotations

import functools

import pytest
from filelock import FileLock
from llamafactory.train.tuner import run_exp
from tiny import make_adapter, make_model, recipe
from two_ranks import TWO_PAIRS_IN_MICRO_BATCHES_OF_ONE, logs

from llamafactory_ext.losses.lookup import get_loss


@pytest.fixture(scope="session")
def recipe_for(data, tmp_path_factory):
    """The recipe of a loss: `full` with a reference model, `lora` with an adapter whose base is the reference.

    SGD and float32, because Adam and bf16 would make rounding visible: Adam's first steps are signs.
    """
    folder = tmp_path_factory.mktemp("float32")
    # Room for the prompt that the sr_ losses put in front.
    shape = {"dtype": "float32", "max_position_embeddings": 512}
    policy, other = (make_model(folder / str(seed), seed, **shape) for seed in (1, 0))
    adapter = make_adapter(folder / "adapter", policy)

    def recipe_of(name, tuning, output, **changes):
        settings = {"pref_loss": name, "finetuning_type": tuning, "optim": "sgd", "learning_rate": 0.05}
        settings |= {"per_device_train_batch_size": 1, "max_steps": 3}
        if get_loss(name).needs_scores:
            settings |= {"pref_margin_column": "gap"}
        if get_loss(name).needs_contrast:
            settings |= {"cringe_top_k": 1}  # no matter of chance, which ranks draw by themselves
        if get_loss(name).needs_reference:
            settings |= {"precompute_ref_log_probs": True}
        if tuning == "lora":
            settings |= {"adapter_name_or_path": str(adapter)}
        elif get_loss(name).needs_reference:
            settings |= {"ref_model": str(other)}
        return recipe(policy, data, output, **settings | changes)

    return recipe_of


@pytest.fixture(scope="session")
def one_process(recipe_for, shared_folder):
    """The steps of a loss in one process. It takes the micro-batches one after the other that two ranks share out."""

    @functools.cache
    def steps_of(name, tuning):
        output = shared_folder / "one_process" / f"{name}-{tuning}"
        with FileLock(shared_folder / f"one_process-{name}-{tuning}.lock"):
            if not (output / "trainer_state.json").is_file():
                run_exp(recipe_for(name, tuning, output, **TWO_PAIRS_IN_MICRO_BATCHES_OF_ONE))
        steps = logs(output)
        # Away from ties, where the kinks of hinge, MinorDPO and DPOP would follow the rounding.
        assert not get_loss(name).needs_reference or abs(steps[0]["normalized_rewards/margins"]) > 0.1
        return steps

    return steps_of
