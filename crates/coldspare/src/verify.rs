//! `verify`: may this standby be promoted?

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use coldspare_core::control::Role;
use coldspare_standby::{Depth, Progress, Verdict, Verification};
use serde_json::{Value, json};

use crate::config::Config;
use crate::exit::{Code, Failure, Outcome};
use crate::progress::Bar;
use crate::socket::{self, Request};
use crate::standby::open_copy;
use crate::state::State;

/// How `verify` runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    /// Every byte, not only metadata.
    pub(crate) deep: bool,
    /// An object instead of lines.
    pub(crate) json: bool,
}

/// Runs `verify`: asks the daemon, or opens the standby when none runs.
///
/// # Errors
/// `Usage`, `Damage`.
pub(crate) fn run(config_path: &Path, options: Options) -> Outcome {
    let config = Config::load(config_path)?;
    let state = State::at(&config.state);
    let record = state.control()?;
    if record.role != Role::Standby {
        return Err(Failure::usage(format!("this host is {}; `coldspare verify` runs on the standby", record.role.word())));
    }
    let started = Instant::now();
    let bar = Bar::new("verifying");
    let request = Request::Verify { deep: options.deep };
    let asked = socket::ask(&state.socket_path(), &request, Some(Duration::from_secs(60)), |value| bar.show(value))?;
    let mut found = match asked {
        Some(found) => found,
        None => verify_here(&config, &state, options.deep, &bar)?,
    };
    bar.finish();
    found["seconds"] = json!((started.elapsed().as_secs_f64() * 1000.0).round() / 1000.0);
    print(&found, options)?;
    Ok(if found["verdict"] == Verdict::Consistent.word() { Code::Done } else { Code::Differs })
}

fn verify_here(config: &Config, state: &State, deep: bool, bar: &Bar) -> Result<Value, Failure> {
    let _lock = state.lock()?;
    let copy = open_copy(config, state, &state.control()?)?;
    let progress = Arc::new(Progress::default());
    let depth = if deep { Depth::Deep } else { Depth::Quick };
    let found = std::thread::scope(|scope| {
        let work = scope.spawn(|| copy.verify(depth, &progress));
        while !work.is_finished() {
            bar.show(&progress_json(&progress));
            std::thread::sleep(Duration::from_millis(20));
        }
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    let names: Vec<String> = config.roots.iter().map(|r| r.name.clone()).collect();
    let held = copy.held_back().map_err(Failure::damage)?;
    Ok(to_json(&found.map_err(Failure::damage)?, &held, &names))
}

/// The result as the object that `--json` prints.
pub(crate) fn to_json(found: &Verification, held: &[coldspare_core::Problem], roots: &[String]) -> Value {
    let problem = |p: &coldspare_core::Problem| {
        let mut value = crate::active::problem(p);
        value["root"] = json!(roots.get(usize::from(p.root.0)));
        value
    };
    // 0: only parts came so far.
    let as_of_ms = found.applied.map(|a| a.as_of_ms).filter(|ms| *ms > 0);
    json!({
        "verdict": found.verdict.word(),
        "seq": found.applied.map(|a| a.seq.0),
        "as_of": as_of_ms.map(crate::active::rfc3339),
        "as_of_ms": as_of_ms,
        "checked_entries": found.entries,
        "checked_files": found.files,
        "checked_bytes": found.bytes,
        "problems": found.problems.iter().map(problem).collect::<Vec<_>>(),
        "held_back": held.iter().map(problem).collect::<Vec<_>>(),
    })
}

/// How far it is, for a progress bar.
pub(crate) fn progress_json(progress: &Progress) -> Value {
    let count = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
    json!({"done": count(&progress.entries), "of": count(&progress.entries_total), "bytes": count(&progress.bytes)})
}

fn print(found: &Value, options: Options) -> Result<(), Failure> {
    if options.json {
        println!("{found}");
        return Ok(());
    }
    for (list, what) in [("problems", ""), ("held_back", "held back on the active: ")] {
        for p in found[list].as_array().into_iter().flatten() {
            let text = |key: &str| p[key].as_str().unwrap_or_default().to_string();
            println!("{what}{}: {}: {} ({})", text("root"), text("path"), text("kind"), text("detail"));
        }
    }
    let what = if options.deep { "every byte" } else { "metadata" };
    println!(
        "{}: as of {}, {} entries, {} bytes read ({what}), {} problems, {} seconds",
        found["verdict"].as_str().unwrap_or_default(),
        found["as_of"].as_str().unwrap_or(if found["seq"].is_null() { "never" } else { "unknown" }),
        found["checked_entries"],
        found["checked_bytes"],
        found["problems"].as_array().map_or(0, Vec::len),
        found["seconds"],
    );
    Ok(())
}
