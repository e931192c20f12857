"""What becomes of parts that particles may lack between epochs: looked for, then their shares learnt."""

from __future__ import annotations

from flexlib.train.confirm_parts import refine_rigid
from flexlib.train.occupancy import learn_shares
from flexlib.train.part_search import find_parts
from flexlib.train.setup import Setup
from flexlib.train.state import State


def follow_parts(setup: Setup, state: State) -> None:
    """At the epochs for it, look for parts where there are none yet; learn the shares of those that there are."""
    if setup.settings.occupancy == "none":
        return
    if len(state.occupancy):
        learn_shares(setup, state)
    elif setup.schedule.looks_for_parts(state.epoch, state.anneal_from):
        find_parts(setup, state)
        if len(state.occupancy):
            refine_rigid(setup, state)
