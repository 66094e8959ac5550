use std::process::ExitCode;

use clap::Parser;
use coordinator::cli::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    cli.start_tracing();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: failed to start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let interrupted = async {
        // Without the handler Ctrl-C ends the process all the same, only less politely.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let code = match runtime.block_on(cli.run(interrupted)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    };
    // Work that Ctrl-C abandoned is not waited for.
    runtime.shutdown_background();
    code
}
