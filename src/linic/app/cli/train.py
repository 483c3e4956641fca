"""`linic train RECIPE --data ... --budget ...`: arguments and work are the training room's own."""
from linic.train import command

arguments = command.add_arguments
run = command.run
