//! The `clone` command.

fn main() -> std::process::ExitCode {
    clone::cli::main()
}
