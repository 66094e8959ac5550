use std::process::ExitCode;

use clap::Parser;
use participant::cli::Cli;

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
            eprintln!("error: {}", told(&error));
            ExitCode::FAILURE
        }
    };
    // Work that Ctrl-C abandoned is not waited for.
    runtime.shutdown_background();
    code
}

/// The error and its causes, without those that an outer message already quotes.
fn told(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| match told.as_str() {
        "" => cause,
        outer if outer.contains(&cause) => told,
        outer => format!("{outer}: {cause}"),
    })
}
