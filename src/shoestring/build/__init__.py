"""The composition root: a recipe becomes objects here, and only here.

stores     data            -> an open store
systems    model, objective, sampling -> networks, turns, product; microdit and wuerstchen are kinds of it
phases     phases          -> plans that the loop runs
looks      previews and held-out losses of a run in progress
runs       all of it       -> a run ready to train
"""

from shoestring.build.kinds import system_of
from shoestring.build.looks import held_out_captions
from shoestring.build.phases import accumulated, phase_flops, plan_phase, plan_phases
from shoestring.build.runs import check_claim, claimed, make_training, make_turns
from shoestring.build.stores import open_store, scenes_store
from shoestring.build.systems import AnySystem, Opened, Part

__all__ = [
    "AnySystem",
    "Opened",
    "Part",
    "accumulated",
    "check_claim",
    "claimed",
    "held_out_captions",
    "make_training",
    "make_turns",
    "open_store",
    "phase_flops",
    "plan_phase",
    "plan_phases",
    "scenes_store",
    "system_of",
]
