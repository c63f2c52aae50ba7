"""Plans: a model, its data, a target and a graph of passes, read from YAML with every mistake told at once."""

from compress.plan.explain import explain, mermaid
from compress.plan.model import Export, Node, Plan, Step
from compress.plan.reader import Tables
from compress.plan.schema import schema

__all__ = ["Export", "Node", "Plan", "Step", "Tables", "explain", "mermaid", "schema"]
