"""Plans: a model, its data, a target and a graph of passes, read from YAML with every mistake told at once."""

from compress.plan.explain import explain, mermaid
from compress.plan.graph import Node, leaves
from compress.plan.model import Plan
from compress.plan.reader import Tables
from compress.plan.schema import schema
from compress.plan.steps import Export, Gradual, Step

__all__ = ["Export", "Gradual", "Node", "Plan", "Step", "Tables", "explain", "leaves", "mermaid", "schema"]
