//! `coldspare-load`: pushes, forks, collections by git and LFS uploads at given rates, against a home on a test host.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::Parser;
use coldspare_sim::load::{LFS, Load, REPOSITORIES, Rates, Report, Shape};
use serde_json::json;

/// Pushes, forks, collects and uploads at given rates, by the real git, and prints what was done.
///
/// For test hosts. It writes nothing but repositories and an LFS store of its own, which stay.
#[derive(Debug, Parser)]
#[command(name = "coldspare-load", version)]
struct Args {
    /// Make a home there; nothing may be there yet
    #[arg(long, value_name = "DIR", required_unless_present = "into", conflicts_with = "into")]
    home: Option<PathBuf>,
    /// Into a home that is there already: repositories NAME-1, NAME-2, …, forks NAME-fork-1, …, and the LFS store NAME
    #[arg(long, value_name = "HOME")]
    into: Option<PathBuf>,
    /// What all that is made is named by
    #[arg(long, default_value = "load")]
    name: String,
    /// How long
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    seconds: u64,
    /// Pushes a second, to all repositories in turn
    #[arg(long, value_name = "RATE", value_parser = rate, default_value_t = 1.0)]
    pushes_per_second: f64,
    /// Forks an hour
    #[arg(long, value_name = "RATE", value_parser = rate, default_value_t = 0.0)]
    forks_per_hour: f64,
    /// Collections by git an hour, of all repositories in turn
    #[arg(long, value_name = "RATE", value_parser = rate, default_value_t = 0.0)]
    gcs_per_hour: f64,
    /// LFS uploads an hour
    #[arg(long, value_name = "RATE", value_parser = rate, default_value_t = 0.0)]
    lfs_per_hour: f64,
    /// Pushes that may be under way at once
    #[arg(long, value_name = "N", default_value_t = 4)]
    pushers: usize,
    /// Repositories that are pushed to
    #[arg(long, value_name = "N", default_value_t = 20)]
    repositories: usize,
    /// Commits of a push; each changes one file
    #[arg(long, value_name = "N", default_value_t = 5)]
    commits: usize,
    /// Size of that file
    #[arg(long, value_name = "BYTES", default_value_t = 160)]
    file_bytes: usize,
    /// Size of an LFS object
    #[arg(long, value_name = "BYTES", default_value_t = 10_000_000)]
    lfs_bytes: u64,
    /// Decides all content: the same seed makes the same commits
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the clones are that are pushed from, outside of the home; gone at the end [default: a temporary folder]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// A rate that a host may have.
fn rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|e| format!("{e}"))?;
    if (0.0..=1e6).contains(&rate) { Ok(rate) } else { Err("it has to be between 0 and 1,000,000".into()) }
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok((home, report)) if args.json => {
            let mut all = report.json();
            all["home"] = json!(home.to_string_lossy());
            all["name"] = json!(args.name);
            all["seed"] = json!(args.seed);
            println!("{all}");
            ExitCode::SUCCESS
        }
        Ok((home, report)) => {
            let (name, home) = (&args.name, home.display());
            println!("{report}made: {home}/{REPOSITORIES}/{name}-*, {home}/{LFS}/{name}, by seed {}", args.seed);
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("coldspare-load: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> io::Result<(PathBuf, Report)> {
    let about = |path: &PathBuf| {
        let path = path.display().to_string();
        move |e: io::Error| io::Error::new(e.kind(), format!("{path}: {e}"))
    };
    let home = match (&args.home, &args.into) {
        (Some(home), _) => {
            fs::create_dir(home).map_err(about(home))?;
            home
        }
        (None, Some(home)) => home,
        (None, None) => return Err(io::Error::other("neither --home nor --into")),
    };
    let home = home.canonicalize().map_err(about(home))?;
    let above = args.scratch.clone().unwrap_or_else(std::env::temp_dir).canonicalize()?;
    if above.starts_with(&home) {
        return Err(io::Error::other(format!("{} is in the home; --scratch names a folder outside of it", above.display())));
    }
    let work = tempfile::Builder::new().prefix("coldspare-load-").tempdir_in(&above).map_err(about(&above))?;
    let shape = Shape {
        name: args.name.clone(),
        repositories: args.repositories,
        commits: args.commits,
        file_bytes: args.file_bytes,
        lfs_bytes: args.lfs_bytes,
        seed: args.seed,
    };
    let rates = Rates {
        pushes_per_second: args.pushes_per_second,
        pushers: args.pushers,
        forks_per_hour: args.forks_per_hour,
        gcs_per_hour: args.gcs_per_hour,
        lfs_per_hour: args.lfs_per_hour,
    };
    let load = Load::new(&home, work.path(), shape)?;
    let report = load.run(&rates, Duration::from_secs(args.seconds), &AtomicBool::new(false))?;
    Ok((home, report))
}
