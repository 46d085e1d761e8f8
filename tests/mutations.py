"""Mutations of the library, each with the test that must notice it: they show that the tests can fail.

    python tests/mutations.py             every mutation, a few seconds each
    python tests/mutations.py --only 7    one, by number or by part of its description
    python tests/mutations.py --list

Each is applied to a copy of the package in a temporary folder, where only the named test is run. Before that, all named
tests must pass on the unchanged copy. The exit status is 1 if a mutation survives, if its old text is not there exactly
once, or if its test cannot be run.
"""

# ruff: noqa: T201 (a script that reports on standard output)

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300
ENDED = 100  # tells an exit status of pytest from that of a process that died of something else


@dataclass(frozen=True)
class Mutation:
    """One change of the code: what it breaks, in which file of ``bilevel/``, and the test expected to notice.

    The test is named by its file and function; the folder is found, since no two files of tests have one name.
    """

    what: str
    file: str
    old: str
    new: str
    test: str


def named(test: str, folder: Path) -> str:
    """The test as pytest takes it, its file found in ``folder``."""
    file, separator, function = test.partition("::")
    (path,) = folder.rglob(file)
    return f"{path}{separator}{function}"


def step_of(case: str) -> str:
    """The comparison with the plain reference, for one row of its table."""
    return f"test_directions.py::test_four_steps_equal_the_reference[{case}]"


BARRIER, TERMS = "barrier.py", "methods/dynamic_barrier.py"
DESCENT, WALK = "lower_steps.py", "hypergradient/adjoint.py"
EVALUATION, REPLAY, PRODUCTS, ROUTING = (
    "evaluation/evaluations.py",
    "evaluation/replay.py",
    "hypergradient/products.py",
    "hypergradient/mode_choice.py",
)
LINEAR, SEQUENTIAL, UNROLLED = "hypergradient/solvers.py", "methods/sequential.py", "methods/unrolled.py"
KEPT_GRAPH, START = "hypergradient/graph.py", "hypergradient/start.py"
EMLC, MLC, IMPLICIT = "methods/emlc.py", "methods/mlc.py", "methods/implicit.py"

MUTATIONS = [
    # The gradients of q
    Mutation(
        "sign of grad_alpha q",
        TERMS,
        "subtract(g.upper, ahead.upper)",
        "subtract(ahead.upper, g.upper)",
        "test_identities.py::test_grad_alpha_q_is_the_corrector_pulled_by_the_change_of_log_probabilities",
    ),
    Mutation(
        "sign of Q",
        TERMS,
        "constraint = g.value.to(wide) - ahead.value.to(wide)",
        "constraint = ahead.value.to(wide) - g.value.to(wide)",
        step_of("barrier value"),
    ),
    Mutation(
        "difference read as value_function",
        TERMS,
        'if self.value_gradient == "difference" else g.lower',
        'if self.value_gradient == "differences" else g.lower',
        step_of("difference"),
    ),
    Mutation(
        "unrolled: nothing through the steps in alpha",
        TERMS,
        "subtract(q_upper, through_upper)",
        "q_upper",
        step_of("unrolled"),
    ),
    Mutation(
        "Q on the last batch",
        TERMS,
        "ahead = oracle.lower(at=walk.end",
        "ahead = oracle.lower(self.inner_steps - 1, at=walk.end",
        step_of("three steps, three batches"),
    ),
    Mutation(
        "one inner step too few",
        TERMS,
        "walk = descend(oracle, rule, g, self.inner_steps,",
        "walk = descend(oracle, rule, g, max(1, self.inner_steps - 1),",
        step_of("three steps, one batch"),
    ),
    # The multiplier
    Mutation(
        "norm over the lower level alone",
        TERMS,
        "_on(f, squared_norm(q_upper)) + ",
        "",
        step_of("ebomlc"),
    ),
    Mutation(
        "inner product over the lower level alone",
        TERMS,
        "upper=_on(f, dot(f.upper, q_upper))",
        "upper=0 * _on(f, dot(f.upper, q_upper))",
        step_of("gradient norm, F of alpha"),
    ),
    Mutation(
        "eps left out", BARRIER, "torch.ones_like(squared), squared) + eps)", "squared, squared))", step_of("eps")
    ),
    Mutation(
        "cutoff left out",
        BARRIER,
        "negligible = squared <= cutoff",
        "negligible = squared <= 0",
        step_of("cutoff above the norm"),
    ),
    Mutation(
        "cutoff exclusive",
        BARRIER,
        "negligible = squared <= cutoff",
        "negligible = squared < cutoff",
        "test_barrier.py::test_cutoff_is_inclusive_and_a_step",
    ),
    Mutation(
        "no maximum",
        BARRIER,
        "found = found.clamp(max=maximum)",
        "pass",
        step_of("multiplier_max"),
    ),
    Mutation(
        "multiplier may be negative",
        BARRIER,
        "excess = torch.relu(barrier(products) - products.total)",
        "excess = barrier(products) - products.total",
        "test_identities.py::test_an_inactive_barrier_leaves_grad_f_alone",
    ),
    Mutation(
        "constraint of the wrong sense",
        BARRIER,
        "torch.relu(barrier(products) - products.total)",
        "torch.relu(barrier(products) + products.total)",
        "test_identities.py::test_an_active_barrier_meets_its_constraint_with_equality",
    ),
    Mutation(
        "Value without its clamp",
        BARRIER,
        "products.value.clamp(min=0.0)",
        "products.value",
        "test_barrier.py::test_value_never_asks_for_an_increase_of_q",
    ),
    Mutation(
        "Aligned without its alignment",
        BARRIER,
        "self.delta * products.squared_norm + products.upper",
        "self.delta * products.squared_norm",
        "test_barrier.py::test_equation_10_gives_equation_11",
    ),
    Mutation(
        "no damping",
        TERMS,
        "weight = self.damping * multiplier(",
        "weight = 1.0 * multiplier(",
        "test_identities.py::test_damping_violates_the_constraint_by_what_it_takes_away",
    ),
    Mutation(
        "gradient norm reported squared",
        TERMS,
        "gradient_norm=products.squared_norm.sqrt()",
        "gradient_norm=products.squared_norm",
        step_of("bome"),
    ),
    # The lower step
    Mutation(
        "the first group's rate for all groups",
        DESCENT,
        '    return [group["lr"] for group in level.groups()]',
        '    return [level.groups()[0]["lr"] for group in level.groups()]',
        step_of("bome"),
    ),
    Mutation(
        "inner_lr ignored",
        DESCENT,
        "    if rate is not None:\n        return [rate] * len(level.tensors)\n",
        "",
        step_of("inner_lr"),
    ),
    Mutation(
        "inner_lr ignored by the preview",
        DESCENT,
        'group["lr"] if rate is None else rate for group',
        'group["lr"] for group',
        step_of("preview with inner_lr"),
    ),
    Mutation(
        "preview without momentum",
        DESCENT,
        'group["momentum"] * held + (1',
        "0 * held + (1",
        step_of("preview of momentum"),
    ),
    Mutation(
        "preview without dampening",
        DESCENT,
        '(1 - group["dampening"]) * g',
        "g",
        step_of("preview of dampening"),
    ),
    Mutation(
        "preview without Nesterov's step",
        DESCENT,
        'if group["nesterov"] else buffer',
        "if False else buffer",
        step_of("preview of nesterov"),
    ),
    Mutation(
        "preview of SGD without weight decay",
        DESCENT,
        '        g = g + group["weight_decay"] * x\n    if group["momentum"] != 0:',
        '        pass\n    if group["momentum"] != 0:',
        step_of("preview of weight decay"),
    ),
    Mutation(
        "preview of AdamW without weight decay",
        DESCENT,
        'x = (x - rate * group["weight_decay"] * x).to(x.dtype)',
        "pass",
        step_of("preview of adamw"),
    ),
    Mutation(
        "preview of AdamW as Adam",
        DESCENT,
        'if group.get("decoupled_weight_decay"):',
        "if False:",
        step_of("preview of adamw"),
    ),
    Mutation(
        "preview of Adam starts its count anew",
        DESCENT,
        'state["step"] + 1 if "step" in state',
        'state["step"] * 0 + 1 if "step" in state',
        step_of("preview of adam"),
    ),
    Mutation(
        "preview of AMSGrad forgets the maximum",
        DESCENT,
        "v = v if held is None else torch.maximum(held, v)",
        "v = v",
        step_of("preview of amsgrad"),
    ),
    Mutation(
        "derivative of Adam at a gradient of zero",
        DESCENT,
        "    ratio = torch.where(seen, ratio, ratio.detach())\n",
        "",
        "test_descent.py::test_adam_at_a_gradient_of_zero",
    ),
    Mutation(
        "derivative of the root at zero",
        DESCENT,
        "torch.where(seen, torch.where(seen, v, 1.0).sqrt(), 0.0)",
        "v.sqrt()",
        "test_descent.py::test_adam_at_a_gradient_of_zero",
    ),
    # The walk back
    Mutation(
        "the walk back loses the optimizer's state",
        WALK,
        "            new_state[i][name] = bar\n",
        "            pass\n",
        step_of("unrolled preview of momentum"),
    ),
    Mutation(
        "the walk back loses the direct part",
        WALK,
        "point_bar = add_scaled(through_point, 1.0, through_gradient)",
        "point_bar = through_gradient",
        step_of("unrolled"),
    ),
    Mutation(
        "the walk back loses the curvature",
        WALK,
        "point_bar = add_scaled(through_point, 1.0, through_gradient)",
        "point_bar = through_point",
        step_of("unrolled"),
    ),
    Mutation(
        "the walk back uses one batch",
        WALK,
        "mixed_product(oracle, step.index, gradient_bar",
        "mixed_product(oracle, 0, gradient_bar",
        step_of("two steps, two batches, unrolled"),
    ),
    Mutation(
        "the walk back stays at the current point",
        WALK,
        "product, through_gradient = mixed_product(oracle, step.index, gradient_bar, step.point, route)",
        "product, through_gradient = mixed_product(oracle, step.index, gradient_bar, None, route)",
        step_of("unrolled, reverse"),
    ),
    Mutation(
        "the end point is the parameters' own memory",
        WALK,
        "x.clone() if x.data_ptr() in own else x for x in point",
        "x for x in point",
        "test_trajectory.py::test_a_variable_that_g_does_not_use_is_carried_along",
    ),
    # Evaluations elsewhere leave no trace
    Mutation(
        "values are not taken out again",
        EVALUATION,
        "                if at is not None:\n                    exchange(parameters, at)\n"
        "                torch.clear_autocast_cache()\n",
        "                torch.clear_autocast_cache()\n",
        "test_contract.py::test_directions_move_nothing",
    ),
    Mutation(
        "requires_grad stays off",
        EVALUATION,
        "variable.requires_grad_(True)",
        "pass",
        "test_contract.py::test_directions_move_nothing",
    ),
    Mutation(
        "the last evaluation is not forward-only",
        EVALUATION,
        "                if freeze:\n",
        "                if False:\n",
        "test_contract.py::test_calls_of_the_losses_are_the_documented_ones",
    ),
    Mutation(
        "captured tensors are not noticed",
        "evaluation/losses.py",
        "stale = stale or node._sequence_nr() < since",
        "stale = False",
        "test_evaluator.py::test_a_captured_value_of_a_lower_variable_is_refused",
    ),
    Mutation(
        "a target without a gradient is not noticed",
        EVALUATION,
        'loss.check_use("upper", evaluation.upper)',
        "pass",
        "test_identities.py::test_a_target_that_carries_no_gradient_is_refused",
    ),
    Mutation(
        "look-ahead evaluations move buffers",
        REPLAY,
        "self._buffers.restore(standing)",
        "pass",
        "test_replay.py::test_buffers_move_once_a_step_by_the_lower_loss",
    ),
    Mutation(
        "the second loss at the current point moves buffers again",
        REPLAY,
        "                self._buffers.keep_noted(standing)\n",
        "                pass\n",
        "test_replay.py::test_buffers_move_once_a_step_by_the_lower_loss",
    ),
    Mutation(
        "random state is not replayed",
        REPLAY,
        "            first_random.restore()\n",
        "            pass\n",
        "test_replay.py::test_dropout_cancels_in_q",
    ),
    Mutation(
        "random state stays where a look-ahead left it",
        REPLAY,
        "            if again:\n                random.restore()\n",
        "",
        "test_replay.py::test_the_random_state_is_that_of_one_evaluation_of_each_batch",
    ),
    Mutation(
        "held tensors are not replayed",
        "evaluation/hold.py",
        "return self.values[self.cursor - 1].clone()",
        "return tensor.detach()",
        "test_identities.py::test_grad_alpha_q_is_the_corrector_pulled_by_the_change_of_log_probabilities",
    ),
    Mutation(
        "held tensors carry a gradient",
        "evaluation/hold.py",
        "            return tensor.detach()\n",
        "            return tensor\n",
        "test_replay.py::test_hold_cuts_the_gradient_inside_a_step_and_is_the_identity_outside",
    ),
    Mutation(
        "training flags stay as a loss set them",
        REPLAY,
        "                part.training = training\n",
        "                pass\n",
        "test_replay.py::test_flags_that_a_loss_sets_hold_until_its_call_ends",
    ),
    Mutation(
        "after an error the random state is not put back",
        REPLAY,
        "        self._start_random.restore()\n",
        "",
        "test_contract.py::test_a_loss_that_raises_at_any_call_changes_nothing",
    ),
    Mutation(
        "directions keep their moves of buffers",
        "optimizer/base.py",
        "            oracle.replay.undo()\n            return replace(answer",
        "            return replace(answer",
        "test_replay.py::test_directions_give_buffers_back",
    ),
    Mutation(
        "aux of the look-ahead",
        TERMS,
        "return Terms(f, g, walk.end",
        "return Terms(f, Evaluation(g.value, g.upper, g.lower, ahead.aux), walk.end",
        "test_contract.py::test_aux_is_that_of_the_current_point_and_detached",
    ),
    # Products
    Mutation(
        "what no substitute reaches is not noticed",
        PRODUCTS,
        "    if missed:\n        raise NoForwardMode(",
        "    if False:\n        raise NoForwardMode(",
        "test_products.py::test_a_captured_parameter_of_a_module_is_named",
    ),
    Mutation(
        "double backward forgets alpha",
        PRODUCTS,
        "return Found(_double_backward(oracle, index, direction, at, [*upper, *lower]))",
        "found = _double_backward(oracle, index, direction, at, lower)\n"
        "    return Found([*[None] * len(upper), *found])",
        step_of("unrolled, reverse"),
    ),
    # Arithmetic
    Mutation(
        "products accumulated in float32",
        "vectors.py",
        'return torch.float32 if device.type == "mps" else torch.float64',
        "return torch.float32",
        "test_vectors.py::test_products_of_float32_do_not_overflow_or_underflow",
    ),
    Mutation(
        "an exchange that copies one way",
        "vectors.py",
        "torch._foreach_copy_(right, kept)",
        "pass",
        "test_vectors.py::test_exchange_is_an_involution_bit_for_bit",
    ),
    # Handing over, checkpoints
    Mutation(
        "the lower direction is not looked at",
        "optimizer/apply.py",
        '        "the lower direction": list(directions.lower.values()),\n',
        "",
        "test_nonfinite.py::test_apply_checks_what_it_is_given",
    ),
    Mutation(
        "raise is silent",
        "optimizer/apply.py",
        "    if must_be:\n",
        "    if False:\n",
        "test_nonfinite.py::test_raise_changes_nothing",
    ),
    Mutation(
        "a skipped step moves buffers",
        "optimizer/base.py",
        "                oracle.replay.undo_buffers()\n            return replace(directions.stats",
        "                pass\n            return replace(directions.stats",
        "test_nonfinite.py::test_skip_moves_neither_level_nor_any_state",
    ),
    Mutation(
        "stale gradients of frozen parameters stay",
        "optimizer/apply.py",
        "            tensor.grad = None\n",
        "            pass\n",
        "test_newcomer.py::test_frozen_layers_with_stale_gradients_stand_still",
    ),
    Mutation(
        "step_from ignored",
        TERMS,
        'if self.step_from == "inner" else None',
        "if False else None",
        step_of("step from inner"),
    ),
    Mutation(
        "the lower step starts from w whatever step_from says",
        "optimizer/base.py",
        "            place(self._lower, directions.start)\n",
        "            pass\n",
        step_of("step from inner, adam"),
    ),
    Mutation(
        "a saved state goes on with the optimizer",
        "optimizer/base.py",
        '"lower_optimizer": deepcopy(self._lower.optimizer.state_dict()),',
        '"lower_optimizer": self._lower.optimizer.state_dict(),',
        "test_contract.py::test_later_steps_do_not_change_a_saved_state",
    ),
    Mutation(
        "a refused state stays half loaded",
        "optimizer/base.py",
        "                optimizer.load_state_dict(state)\n",
        "                pass\n",
        "test_contract.py::test_a_wrong_state_is_refused_and_changes_nothing",
    ),
    Mutation(
        "apply hands over the caller's own tensors",
        "optimizer/base.py",
        "lower={name: d.clone() for name, d in directions.lower.items()}",
        "lower=directions.lower",
        "test_contract.py::test_apply_leaves_the_directions_as_they_are",
    ),
    Mutation(
        "variables unfrozen later are ignored",
        "levels.py",
        "        self.names, self.tensors, self._marks = names, tensors, marks\n",
        "        if not self.names:\n            self.names, self.tensors, self._marks = names, tensors, marks\n",
        "test_errors.py::test_an_unfrozen_variable_in_its_optimizer_is_picked_up",
    ),
    # Linear solvers
    Mutation(
        "conjugate gradients return the iterate before the one that met the tolerance",
        LINEAR,
        "x, r = add_scaled(x, a, p), add_scaled(r, -a, hp)",
        "last, r = x, add_scaled(r, -a, hp)\n            x = add_scaled(last, a * (squared_norm(r) > goal), p)",
        "test_linear.py::test_two_x_is_two",
    ),
    Mutation(
        "one iteration too few",
        LINEAR,
        "        for _ in range(self.iterations):\n",
        "        for _ in range(self.iterations - 1):\n",
        "test_linear.py::test_conjugate_gradients_minimise_over_the_krylov_space",
    ),
    Mutation(
        "damping left out",
        LINEAR,
        "return product if damping == 0 else lambda v: add_scaled(product(v), damping, v)",
        "return product",
        "test_implicit.py::test_the_closed_form_of_a_quadratic",
    ),
    Mutation(
        "a step along no curvature",
        LINEAR,
        "curved = curved & (curvature > unit * steepest * length)",
        "curved = curved & (curvature > 0)",
        "test_linear.py::test_a_direction_without_positive_curvature_ends_conjugate_gradients",
    ),
    Mutation(
        "the solution of a zero right-hand side is the start",
        LINEAR,
        "    better = squared_norm(found) < scale ",
        "    better = squared_norm(found) < scale + 1e9 ",
        "test_linear.py::test_a_zero_right_hand_side_has_the_solution_zero",
    ),
    Mutation(
        "a start that is worse than zero",
        LINEAR,
        "    better = squared_norm(found) < scale ",
        "    better = scale > 0 ",
        "test_linear.py::test_a_start_that_is_worse_than_zero_is_dropped",
    ),
    Mutation(
        "a start with a velocity",
        LINEAR,
        "        v = _zeros_like(right)\n",
        "        v = list(right)\n",
        "test_linear.py::test_a_start_near_the_solution_only_comes_nearer",
    ),
    Mutation(
        "an iterate that goes on after it has converged",
        LINEAR,
        "x = add_scaled(x, active.to(rr.dtype), _times(rates, v))",
        "x = add_scaled(x, 1.0, _times(rates, v))",
        "test_linear.py::test_without_asking_later_iterations_leave_the_converged_iterate_as_it_is",
    ),
    # Hypergradient methods
    Mutation(
        "Implicit: sign of the part through w",
        IMPLICIT,
        "self._named(subtract(f.upper, through),",
        "self._named(subtract(through, f.upper),",
        "test_implicit.py::test_ridge_regression_entry_by_entry",
    ),
    Mutation(
        "Implicit: products on the first batch",
        IMPLICIT,
        "last = self.lower_batches - 1",
        "last = 0",
        "test_implicit.py::test_conjugate_gradients_on_a_network",
    ),
    Mutation(
        "Implicit: no warm start",
        IMPLICIT,
        'state={"last": solution})\n',
        "state={})\n",
        "test_implicit.py::test_a_warm_start_continues_from_the_last_p",
    ),
    Mutation(
        "Implicit: directions move the warm start",
        IMPLICIT,
        'stats, state={"last": solution})\n',
        "stats, state={'last': solution}, start=self._last.__setattr__('value', solution))\n",
        "test_implicit.py::test_a_warm_start_continues_from_the_last_p",
    ),
    Mutation(
        "EMLC: blocks paired in the wrong order",
        EMLC,
        "age=self.inner_steps - 1 - index",
        "age=index",
        "test_emlc.py::test_each_block_is_paired_with_its_own_step",
    ),
    Mutation(
        "EMLC: products at the current point",
        EMLC,
        "point = None if beginning else steps[index].point",
        "point = None",
        "test_emlc.py::test_equation_11_on_a_network",
    ),
    Mutation(
        "EMLC: one rate for all groups",
        EMLC,
        "for x, rate, discount in zip(g, rates, discounts, strict=True)",
        "for x, rate, discount in zip(g, rates[:1] * len(rates), discounts, strict=True)",
        "test_emlc.py::test_equation_11_on_a_network",
    ),
    Mutation(
        "EMLC: replay goes on from the end",
        EMLC,
        "            beginning.restore()\n",
        "            pass\n",
        "test_emlc.py::test_replay_is_store_bit_for_bit",
    ),
    Mutation(
        "MLC: the discount of the whole g1",
        MLC,
        "projection = dot(add_scaled(f.lower, 1.0, through_step), here.lower)",
        "projection = dot(f.lower, here.lower)",
        "test_mlc.py::test_several_upper_updates_call_by_call",
    ),
    Mutation(
        "MLC: the estimate is kept after it was used",
        MLC,
        '"accumulated": {} if due else estimate',
        '"accumulated": estimate',
        "test_mlc.py::test_several_upper_updates_call_by_call",
    ),
    Mutation(
        "MLC: the estimate is not saved",
        "optimizer/method_state.py",
        "dict(v) if isinstance(v, Mapping) else v for",
        "{} if isinstance(v, Mapping) else v for",
        "test_mlc.py::test_a_checkpoint_between_two_calls",
    ),
    Mutation(
        "MLC: a bad estimate is accumulated",
        "optimizer/apply.py",
        "            if isinstance(value, Mapping)\n",
        "            if not value\n",
        "test_mlc.py::test_a_bad_gradient_is_not_accumulated",
    ),
    Mutation(
        "FiniteDifference: its radius is ignored",
        "methods/finite_difference.py",
        "radius=self.radius",
        "radius=None",
        "test_first_order.py::test_darts",
    ),
    Mutation(
        "FiniteDifference: F at the current point",
        "methods/finite_difference.py",
        "oracle.upper(at=ahead)",
        "oracle.upper()",
        "test_first_order.py::test_darts",
    ),
    Mutation(
        "SAMA: nothing of the first moment",
        "methods/sama.py",
        "- beta1 * (1 - beta2) * g * m)",
        "- 0 * m)",
        "test_first_order.py::test_sama",
    ),
    Mutation(
        "SAMA: the difference on the first batch",
        "methods/sama.py",
        "upper_product(oracle, self.lower_batches - 1, direction",
        "upper_product(oracle, 0, direction",
        "test_first_order.py::test_sama",
    ),
    Mutation(
        "Unrolled: truncation of real steps ignored",
        UNROLLED,
        "rule=self._rule, keep=self._differentiated)",
        "rule=self._rule, keep=self.inner_steps)",
        "test_unrolled.py::test_truncation",
    ),
    Mutation(
        "Unrolled: the start counts as a constant",
        UNROLLED,
        "through = add_scaled(through, 1.0, through_start(",
        "through = add_scaled(through, 0.0, through_start(",
        "test_unrolled.py::test_maml_on_a_network",
    ),
    Mutation(
        "Unrolled: one starting value counts what another was computed from",
        START,
        "x + 0 if x.requires_grad else",
        "x if x.requires_grad else",
        "test_unrolled.py::test_maml_on_a_network",
    ),
    Mutation(
        "Unrolled: the graph misses what F reads elsewhere",
        KEPT_GRAPH,
        "        self._refuse_read(loss, found[len(upper) + len(self._point) :])\n",
        "",
        "test_unrolled.py::test_a_captured_parameter_is_refused_by_the_graph_for_either_loss",
    ),
    Mutation(
        "Unrolled: the graph keeps what would be recomputed elsewhere",
        KEPT_GRAPH,
        "with torch.autograd.graph.disable_saved_tensors_hooks(RECOMPUTED):",
        "with torch.enable_grad():",
        "test_forward_mode.py::test_the_kept_graph",
    ),
    Mutation(
        "Unrolled: the graph trusts a wrong second derivative",
        KEPT_GRAPH,
        "            refuse_wrong_rules([value, *(g for g in gradient if g is not None)])\n",
        "            pass\n",
        "test_forward_mode.py::test_the_kept_graph",
    ),
    Mutation(
        "Unrolled: the graph goes on from its own rounding of a real step, without what hooks did",
        UNROLLED,
        "                walk.follow(oracle.point(), self._rule().start())\n",
        "                pass\n",
        "test_unrolled.py::test_hooks_on_real_steps_are_followed_and_not_differentiated",
    ),
    Mutation(
        "Unrolled: real steps with a kept graph leave buffers behind",
        EVALUATION,
        "copied = substitute is not None and not current",
        "copied = substitute is not None",
        "test_unrolled.py::test_without_restore_w_takes_k_plain_torch_steps",
    ),
    Mutation(
        "a substituted evaluation moves the buffers of the modules",
        "evaluation/substitution.py",
        "for place, name in self._buffers] if copy_buffers else []",
        "for place, name in self._buffers] if False else []",
        "test_products.py::test_a_product_on_a_new_batch_moves_no_statistics",
    ),
    Mutation(
        "Unrolled: plain steps are previews",
        SEQUENTIAL,
        'if self.inner_step == "preview":\n            self._check_rule()',
        "if True:\n            self._check_rule()",
        "test_unrolled.py::test_plain_steps_go_with_the_current_rates_of_the_lower_optimizer",
    ),
    Mutation(
        "the upper variables stay moved when the ordinary step fails",
        SEQUENTIAL,
        "                saved.restore()\n                self._state.put_back(remembered)\n",
        "                pass\n",
        "test_contract.py::test_a_loss_that_raises_at_any_call_changes_nothing",
    ),
    Mutation(
        "a skipped step keeps its real lower steps",
        SEQUENTIAL,
        "if stats.skipped and saved is not None:",
        "if False and saved is not None:",
        "test_sequential.py::test_what_is_not_finite_at_any_stage_moves_nothing",
    ),
    Mutation(
        "a real lower step that is not finite is taken",
        SEQUENTIAL,
        "if real and not self._may_train(g):",
        "if False:",
        "test_sequential.py::test_the_error_names_what_was_not_finite",
    ),
    Mutation(
        "parameter groups are not taken back",
        "optimizer/undo.py",
        "        self._groups.restore()\n",
        "",
        "test_rollback.py::test_directions_restore_the_parameter_groups",
    ),
    Mutation(
        "the lower level of an ordinary step is not taken back",
        SEQUENTIAL,
        "                saved.add(self._lower)\n",
        "                pass\n",
        "test_rollback.py::test_a_hook_that_raises_takes_the_whole_step_back",
    ),
    Mutation(
        "the upper level after real steps is not taken back",
        SEQUENTIAL,
        "                    saved.add(self._upper)\n",
        "                    pass\n",
        "test_rollback.py::test_a_hook_that_raises_takes_the_whole_step_back",
    ),
    Mutation(
        "replay at the rates of its end",
        EMLC,
        "                groups[index].restore()\n",
        "",
        "test_rollback.py::test_replay_with_a_rate_from_a_counter_of_the_hooks_own",
    ),
    Mutation(
        "stale directions are applied",
        "optimizer/base.py",
        "if directions.state and self._state.is_stale(directions.mark):",
        "if False:",
        "test_method_state.py::test_directions_whose_state_has_moved_are_refused",
    ),
    Mutation(
        "state that is taken back is in other tensors",
        "optimizer/undo.py",
        "        values.update(self._tensors)\n",
        "        values.update((key, value.clone()) for key, value in self._tensors)\n",
        "test_sequential.py::test_taking_steps_back_restores_the_very_tensors",
    ),
    Mutation(
        "a fallback is forgotten",
        ROUTING,
        '        oracle.verification.choices[f"{ways.kind} product, {route}"] = chosen\n',
        "",
        "test_products.py::test_auto_falls_back_once_and_says_why",
    ),
    Mutation(
        "both products start with the slower route",
        ROUTING,
        'first = "reverse" if kind == "both" or ',
        'first = "reverse" if ',
        "test_products.py::test_the_route_taken_is_told",
    ),
    Mutation(
        "transformer layers on their fused kernel",
        "evaluation/substitution.py",
        "mha.get_fastpath_enabled(), False)",
        "mha.get_fastpath_enabled(), True)",
        "test_forward_mode.py::test_the_route_of_the_table_is_taken_and_right",
    ),
    Mutation(
        "the check leaves optimizer states in float32",
        "checks/check_directions.py",
        ", *_state(upper), *_state(lower), *own]",
        "]",
        "test_sequential.py::test_check_directions",
    ),
    Mutation(
        "the check starts from w where a start is given",
        "methods/formulas.py",
        "first = None if start is None else [x.detach() for x in start()]\n",
        "first = None\n",
        "test_unrolled.py::test_a_start_and_the_check_of_directions",
    ),
    # The check of directions, and the problems
    Mutation(
        "the check passes whatever it finds",
        "checks/claims.py",
        "            return False, WRONG_DERIVATIVE\n",
        "            return True, WRONG_DERIVATIVE\n",
        "test_checking.py::test_a_wrong_backward_in_a_loss_is_found_where_it_is",
    ),
    Mutation(
        "a kink is called a failure",
        "checks/claims.py",
        "                    wrong = False\n",
        "                    pass\n",
        "test_verdicts.py::test_units_at_their_kink_fail_nothing",
    ),
    Mutation(
        "a kink excuses a wrong backward",
        "checks/claims.py",
        "                wrong = wrong or agrees is False\n",
        "                wrong = False\n",
        "test_verdicts.py::test_a_wrong_backward_fails_also_next_to_kinks",
    ),
    Mutation(
        "steps do not shrink at a kink",
        "checks/differences.py",
        "STEPS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)",
        "STEPS = (1e-4, 1e-5)",
        "test_verdicts.py::test_a_kink_inside_the_first_steps_is_left_behind",
    ),
    Mutation(
        "what a custom function computes is held as a constant",
        "checks/constants.py",
        "        if _inside_a_custom_function():\n            return found\n",
        "",
        "test_verdicts.py::test_a_held_constant_makes_differences_those_of_autograd",
    ),
    Mutation(
        "a direction is compared with itself",
        "checks/claims.py",
        "apart = _length(subtract(self.computed, self.expected))",
        "apart = _length(subtract(self.computed, self.computed))",
        "test_verdicts.py::test_a_wrong_direction_fails",
    ),
    Mutation(
        "the reference lets a level's gradients be switched off",
        "checks/plain.py",
        "            torch.clear_autocast_cache()\n            for buffer",
        "            [p.requires_grad_(False) for p in own if at is not None]\n            for buffer",
        "test_verdicts.py::test_a_wrong_direction_fails",
    ),
    Mutation(
        "differences of what was detached pass",
        "checks/claims.py",
        "constant = (False, HELD_NOWHERE) if found.error > SEEN else",
        "constant = (None, HELD_NOWHERE) if found.error > SEEN else",
        "test_verdicts.py::test_differences_of_a_detached_part_fail_and_say_hold",
    ),
    Mutation(
        "the residual of Implicit forgets the damping",
        IMPLICIT,
        'float(getattr(self.solver, "damping", 0.0))',
        "0.0",
        "test_sequential.py::test_check_directions",
    ),
    Mutation(
        "the check leaves float64 behind",
        "evaluation/precision.py",
        "            tensor.data = data\n            tensor.grad = grad",
        "            tensor.data = data.double()\n            tensor.grad = grad",
        "test_checking.py::test_everything_is_restored_bit_for_bit",
    ),
    Mutation(
        "the check loses gradients",
        "evaluation/precision.py",
        "            tensor.grad = grad\n",
        "            pass\n",
        "test_checking.py::test_everything_is_restored_bit_for_bit",
    ),
    Mutation(
        "hypergradient of the quadratic family",
        "problems.py",
        "torch.linalg.solve(self.hessian, upper)",
        "upper",
        "test_problems.py::test_quadratic_hypergradient_agrees_with_central_differences",
    ),
]


def run_pytest(folder: Path, tests: list[str], output: Path) -> None:
    """Run tests in ``folder``, in a process of its own, and end it with ``ENDED`` plus pytest's exit status."""
    import torch  # here, because the parent has no need of it

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # two changes of one file within a second would share its byte code
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    with output.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    options = ["-x", "-q", "-n0", "-m", "", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-W", "error"]
    status = int(pytest.main([*options, *(named(test, folder / "tests") for test in tests)]))
    if "bilevel" in sys.modules and Path(sys.modules["bilevel"].__file__ or "").parent.parent == folder:
        sys.exit(ENDED + status)


class Workshop:
    """A copy of what the tests need, in which one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "output.txt"
        ignore = shutil.ignore_patterns("__pycache__", "examples")
        for name in ("bilevel", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", folder)
        # Processes that start with torch imported, and with the compiler, which every torch optimizer loads:
        # importing them anew takes longer than most of the tests.
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self._processes: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._processes.set_forkserver_preload(["torch", "torch._dynamo", "torch.autograd.forward_ad", "numpy"])

    def run(self, tests: Iterable[str]) -> int:
        """Run tests on the copy; return pytest's exit status, or -1 if it did not come to one."""
        process = self._processes.Process(target=run_pytest, args=(self.folder, list(tests), self.output))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        return max(-1, process.exitcode - ENDED)

    def verdict(self, mutation: Mutation) -> str:
        """Apply one mutation, run its test, undo it; return ``killed`` or what went wrong."""
        path = self.folder / "bilevel" / mutation.file
        source = path.read_text()
        if (times := source.count(mutation.old)) != 1:
            return f"OUT OF DATE: its old text is there {times} times"
        path.write_text(source.replace(mutation.old, mutation.new))
        try:
            status = self.run([mutation.test])
        finally:
            path.write_text(source)
        # 1: tests ran and failed. Anything else, a test that cannot be collected for one, shows nothing.
        return {1: "killed", 0: "SURVIVED"}.get(status, f"NOT RUN: pytest ended with {status}")


def chosen(only: str | None) -> list[tuple[int, Mutation]]:
    """The numbered mutations, or those that ``only`` names by number or by a part of their description."""
    numbered = list(enumerate(MUTATIONS, start=1))
    if only is None:
        return numbered
    if only.isdigit():
        return [(n, m) for n, m in numbered if n == int(only)]
    return [(n, m) for n, m in numbered if only in m.what]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Mutate the library and see that the named tests notice.")
    parser.add_argument("--only", metavar="N", help="a number, or a part of a description")
    parser.add_argument("--list", action="store_true", help="list the mutations and their tests")
    options = parser.parse_args(arguments)
    selected = chosen(options.only)
    if options.list:
        for n, mutation in selected:
            print(f"{n:3} {mutation.what}\n      bilevel/{mutation.file}: {mutation.test}")
        return 0
    if not selected:
        print(f"no mutation is called {options.only}")
        return 1
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        workshop = Workshop(Path(folder).resolve())
        if workshop.run(dict.fromkeys(m.test for _, m in selected)):
            print(workshop.output.read_text())
            print("the named tests do not pass on the unchanged code; nothing was mutated")
            return 1
        failures = 0
        for n, mutation in selected:
            verdict = workshop.verdict(mutation)
            failures += verdict != "killed"
            print(f"{n:3} {verdict:9} {mutation.what}", flush=True)
    print(f"{len(selected) - failures} of {len(selected)} killed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
