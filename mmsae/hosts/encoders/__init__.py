"""Hosts with two towers, or one, of other libraries."""
