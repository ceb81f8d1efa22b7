def model_card(run, code): return ""
