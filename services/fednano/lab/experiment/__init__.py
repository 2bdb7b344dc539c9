"""`fednano experiment`: many federations, each in one process, and tables and plots of what came.

They use the trainer and the strategies that the services use. `plan` is the YAML file, `cell` one
federation, `run` all of them, `results` what is kept; `report`, `plots` and `statistics` are what is
made of it.
"""
