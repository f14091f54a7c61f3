"""Deliberate mistakes, with the complaint of `mypy --strict` that each line gives."""

from dataclasses import replace

import atoll
from atoll import recipes
from atoll.engine import Processes
from atoll.plan.aggregate import Mean
from atoll.plan.codec import ErrorFeedback, TopK
from atoll.plan.local import Gradient, Train
from atoll.plan.optimizer import sgd
from atoll.plan.pace import Sync

data = atoll.data.load("digits").split(clients=10)
plan = recipes.fedavg(lr=0.1)

atoll.train("mlp", data, plan, rounds="5")  # error: Argument "rounds" to "train" has incompatible type "str" [arg-type]
atoll.train("mlp", data, plan, seed=None)  # error: Argument "seed" to "train" has incompatible type "None" [arg-type]
atoll.train("mlp", data, plan, workers=2)  # error: Unexpected keyword argument "workers" for "train" [call-arg]
atoll.train("mlp", data, plan, round=3)  # error: Unexpected keyword argument "round" for "train" [call-arg]
atoll.rounds("mlp", data, plan, out="runs")  # error: Unexpected keyword argument "out" for "rounds" [call-arg]
atoll.train("mlp", plan, plan)  # error: incompatible type "Plan"; expected "Clients" [arg-type]
atoll.train("mlp", data, plan, metrics=3)  # error: Argument "metrics" to "train" has incompatible type [arg-type]
atoll.train("mlp", data, plan, engine=3)  # error: Argument "engine" to "train" has incompatible type [arg-type]
Processes(workers="2")  # error: Argument "workers" to "Processes" has incompatible type "str" [arg-type]
atoll.Settings(rounds="5")  # error: Argument "rounds" to "Settings" has incompatible type "str" [arg-type]

replace(plan, codec=Mean())  # error: Argument "codec" to "replace" of "Plan" has incompatible type "Mean" [arg-type]
replace(plan, pace=TopK(0.1))  # error: Argument "pace" to "replace" of "Plan" has incompatible type "TopK" [arg-type]
replace(plan, codecs=TopK(0.1))  # error: Unexpected keyword argument "codecs" for "replace" of "Plan" [call-arg]
atoll.Plan(Mean(), Mean())  # error: Argument 1 to "Plan" has incompatible type "Mean"; expected "Local" [arg-type]
atoll.Plan(Gradient(), Gradient())  # error: Argument 2 to "Plan" has incompatible type "Gradient" [arg-type]
ErrorFeedback(Sync())  # error: Argument 1 to "ErrorFeedback" has incompatible type "Sync" [arg-type]
recipes.fedavg(lr="0.1")  # error: Argument "lr" to "fedavg" has incompatible type "str" [arg-type]
recipes.fedavg(cohort="ten")  # error: Argument "cohort" to "fedavg" has incompatible type "str" [arg-type]
recipes.diloco(codec=Mean())  # error: Argument "codec" to "diloco" has incompatible type "Mean" [arg-type]
Train(sgd(0.1), epoch=1)  # error: Unexpected keyword argument "epoch" for "Train" [call-arg]
