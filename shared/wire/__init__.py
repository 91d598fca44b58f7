"""What crosses a process boundary: the contract with every other version of Sluice.

A field that is added later has a default: tests decode the payloads of every earlier version. Any
client of the broker can put any bytes there, so the types check whatever later code relies on.
"""
