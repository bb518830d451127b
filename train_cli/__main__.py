from train_cli.main import run

run()
