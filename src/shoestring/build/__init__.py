"""The composition root: a recipe becomes objects here, and only here.

stores     data            -> an open store
networks   model, objective, sampling -> network, loss, pipeline
phases     phases          -> plans that the loop runs
looks      previews and held-out losses of a run in progress
runs       all of it       -> a run ready to train
"""

from shoestring.build.looks import held_out_captions, held_out_rows
from shoestring.build.networks import enter_phase, make_network, make_objective, make_pipeline
from shoestring.build.phases import phase_flops, plan_phase, plan_phases
from shoestring.build.runs import check_claim, claimed, make_training, make_turn
from shoestring.build.stores import open_store, scenes_store

__all__ = [
    "check_claim",
    "claimed",
    "enter_phase",
    "held_out_captions",
    "held_out_rows",
    "make_network",
    "make_objective",
    "make_pipeline",
    "make_training",
    "make_turn",
    "open_store",
    "phase_flops",
    "plan_phase",
    "plan_phases",
    "scenes_store",
]
