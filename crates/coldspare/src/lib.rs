//! The command line, the configuration, and the daemons' thin drivers.
//!
//! Architecture invariant: what is decided is decided in `coldspare-core`; what is done to files, in `coldspare-scan` and
//! `coldspare-standby`. Here events are carried from one to the other, and told to people.

#![forbid(unsafe_code)]

mod active;
mod adoption;
mod application;
pub mod bandwidth;
mod bundle;
mod check;
mod cli;
pub mod config;
mod demo;
mod demotion;
pub mod exit;
mod guard;
mod handover;
mod health;
mod heard;
mod init;
mod memory;
mod plan;
mod progress;
mod promotion;
mod role;
mod roots;
mod seal;
mod serve;
mod socket;
mod standby;
mod state;
mod status;
mod verify;
mod watching;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use cli::{ApplicationCommand, Cli, Command, InitCommand};
use coldspare_core::control::Taking;
use coldspare_scan::watch::Told;
use exit::{Failure, Outcome};
use serve::Serves;
use socket::Asked;
use standby::points::Verb;

/// The version of this build.
pub const BUILD: &str = env!("CARGO_PKG_VERSION");

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { exit::Code::Usage as u8 } else { 0 });
        }
    };
    if cli.command.shares_one_heap() {
        coldspare_os::share_heaps(1);
    }
    start_log();
    match run(cli.command) {
        Ok(code) => ExitCode::from(code as u8),
        Err(failure) => {
            // Nobody may be there to read it: the code counts all the same.
            let _ = writeln!(std::io::stderr(), "coldspare: {failure}");
            ExitCode::from(failure.code as u8)
        }
    }
}

fn run(command: Command) -> Outcome {
    match command {
        Command::Demo { dir, keep } => demo::run(dir, keep),
        Command::Plan { homes, scratch, invite, watch, links, lag, scale, plot, json } => {
            plan::run(&plan::Options { roots: homes, scratch, invite, watch, links, lag_seconds: lag.as_secs_f64(), scale, plot, json })
        }
        Command::PlanPeer { listen, advertise, scratch } => plan::run_peer(&listen, advertise.as_deref(), scratch),
        Command::Init(InitCommand::Standby { init, listen, advertise }) => {
            init::standby(init.into(), listen.as_deref(), advertise.as_deref())
        }
        Command::Init(InitCommand::Active { init, invite, listen, advertise }) => {
            init::active(init.into(), &invite, listen.as_deref(), advertise.as_deref())
        }
        Command::Send { config, once: true, json } => active::run(&config.path, active::Mode::Once { json }),
        Command::Send { config, .. } => serve::run(&config.path, Serves::Active),
        Command::Receive { config } => serve::run(&config.path, Serves::Standby),
        Command::Run { config } => serve::run(&config.path, Serves::Both),
        Command::Promote { config, terms, start, json } => promotion::run(&config.path, &terms.into(), then(start), json),
        Command::Failover { config, terms, start, json } => promotion::fail_over(&config.path, terms.into(), then(start), json),
        Command::Switchover { config, accept_held_back, timeout, json } => {
            handover::run(&config.path, Taking::Now, accept_held_back, timeout, json)
        }
        Command::Demote { config, accept_held_back, timeout, json } => {
            handover::run(&config.path, Taking::WhenPromoted, accept_held_back, timeout, json)
        }
        Command::Checkpoint { config, timeout, json } => status::checkpoint(&config.path, timeout, json),
        Command::Status { config, json, watch } => status::status(&config.path, json, watch),
        Command::Verify { config, quick: _, deep, git, repair, resume, bytes_per_second, json } => {
            verify::run(&config.path, verify::Options { asked: Asked { deep, git, repair, resume, bytes_per_second }, json })
        }
        Command::Adopt { config, json } => adoption::run(&config.path, json),
        Command::Accept { config, json } => standby::decide::run(&config.path, true, json),
        Command::Reject { config, json } => standby::decide::run(&config.path, false, json),
        Command::Points { config, json } => standby::points::run(&config.path, &Verb::List, json),
        Command::Rewind { config, to, json } => standby::points::run(&config.path, &Verb::Rewind { to }, json),
        Command::Export { config, point, json, dir } => standby::export::run(&config.path, &point, &dir, json),
        Command::Resume { config, json } => standby::points::run(&config.path, &Verb::Resume, json),
        Command::Guard { config, status, json, pause, resume } => match (status, pause, resume) {
            (true, ..) => guard::status(&config.path, json),
            (_, true, _) => guard::pause(&config.path),
            (.., true) => guard::resume(&config.path),
            _ => guard::run(&config.path),
        },
        Command::Application(command) => {
            let (verb, config, json) = match command {
                ApplicationCommand::Start { config } => (application::Verb::Start, config, false),
                ApplicationCommand::Stop { config, json } => (application::Verb::Stop, config, json),
                ApplicationCommand::Status { config, json } => (application::Verb::Status, config, json),
                ApplicationCommand::ProveDead { config, json } => (application::Verb::ProveDead, config, json),
            };
            application::run(&config.path, verb, json)
        }
        Command::Hook { name, config } => application::run_hook(&config.path, name),
        Command::Health { config, once } => health::run(&config.path, if once { health::Mode::Once } else { health::Mode::Daemon }),
        Command::Check { config, json } => check::run(&config.path, json),
        Command::Seal { config } => seal::run(&config.path, seal::Verb::Seal),
        Command::Unseal { config } => seal::run(&config.path, seal::Verb::Unseal),
        Command::SealHelper { roots } => seal::run_helper(&roots),
        Command::WatchHelper { processes, roots } => watching::run(&roots, if processes { Told::Processes } else { Told::Changes }),
        Command::Man { dir } => write_man_pages(&dir),
    }
}

fn then(start: bool) -> promotion::Then {
    if start { promotion::Then::Start } else { promotion::Then::Nothing }
}

fn write_man_pages(dir: &std::path::Path) -> Outcome {
    use clap::CommandFactory;
    std::fs::create_dir_all(dir).map_err(|e| Failure::usage(format!("{}: {e}", dir.display())))?;
    clap_mangen::generate_to(Cli::command(), dir).map_err(|e| Failure::usage(format!("{}: {e}", dir.display())))?;
    Ok(exit::Code::Done)
}

fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("COLDSPARE_LOG").unwrap_or_else(|_| "info".into());
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        // Where no log can be written it can't be told of either, and the work goes on.
        .log_internal_errors(false)
        .try_init();
}
