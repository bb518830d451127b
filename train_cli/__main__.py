from train_cli.main import main

main(prog_name="genpoe")
