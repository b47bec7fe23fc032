//! `verify`: may this standby be promoted?

mod active;
mod heal;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use coldspare_core::control::Role;
use coldspare_standby::{Pace, Progress, Verdict};
use serde_json::{Value, json};

use crate::config::Config;
use crate::exit::{Code, Failure, Outcome};
use crate::progress::Bar;
use crate::socket::{self, Asked, Request};
use crate::standby::{Copy, open_copy_alone};
use crate::state::State;
pub(crate) use active::{Compared, NotCompared, add_differences, to_json as compared_json};
pub(crate) use heal::{Fetch, Healed, heal};

/// How `verify` runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    /// How closely, and what to do then.
    pub(crate) asked: Asked,
    /// An object instead of lines.
    pub(crate) json: bool,
}

/// The verdict when what coldspare knows of the standby is damaged.
const DAMAGED: &str = "damaged";

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
    let asked = options.asked;
    let limit = Some(Duration::from_secs(120));
    let mut found = match socket::ask(&state.socket_path(), &Request::Verify(asked), limit, |value| bar.show(value))? {
        Some(found) => found,
        None => verify_here(&config, &state, asked, &bar)?,
    };
    bar.finish();
    if let Some(damage) = state.control_damage()? {
        found["verdict"] = json!(DAMAGED);
        let problem = json!({"root": null, "path": state.control_path().display().to_string(), "kind": "control", "detail": damage});
        if let Some(list) = found["problems"].as_array_mut() {
            list.insert(0, problem);
        }
    }
    found["seconds"] = json!((started.elapsed().as_secs_f64() * 1000.0).round() / 1000.0);
    print(&found, options)?;
    let is_unreachable = found["repair"]["active"] == "unreachable";
    Ok(match found["verdict"].as_str() {
        Some(verdict) if verdict == Verdict::Consistent.word() => Code::Done,
        Some(DAMAGED) => Code::Damage,
        _ if is_unreachable => Code::Unreachable,
        _ => Code::Differs,
    })
}

/// How fast it may read.
pub(crate) fn pace(config: &Config, asked: Asked) -> Pace {
    Pace::new(asked.bytes_per_second.unwrap_or(config.verify.bytes_per_second))
}

fn verify_here(config: &Config, state: &State, asked: Asked, bar: &Bar) -> Result<Value, Failure> {
    let _lock = state.lock()?;
    let copy = open_copy_alone(config, state, &state.control()?)?;
    let progress = Arc::new(Progress { pace: pace(config, asked), ..Progress::default() });
    let shows = std::thread::current();
    let found = std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            let healed = heal(&copy, state, asked, &progress, |_| Fetch::Unreachable, || ());
            shows.unpark();
            healed
        });
        while !work.is_finished() {
            bar.show(&progress_json(&progress));
            std::thread::park_timeout(Duration::from_millis(20));
        }
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    let names: Vec<String> = config.roots.iter().map(|r| r.name.clone()).collect();
    let mut found = to_json(&copy, &found?, &names)?;
    let why = "`coldspare receive` doesn't run here, to which the active connects";
    found["active"] = compared_json(&Err(NotCompared(why.into())), &names);
    Ok(found)
}

/// The result as the object that `--json` prints.
///
/// # Errors
/// `Damage`: the store can't be read.
pub(crate) fn to_json(copy: &Copy, healed: &Healed, roots: &[String]) -> Result<Value, Failure> {
    let problem = |p: &coldspare_core::Problem| {
        let mut value = crate::active::problem(p);
        value["root"] = json!(roots.get(usize::from(p.root.0)));
        value
    };
    let problems = |list: &[coldspare_core::Problem]| list.iter().map(problem).collect::<Vec<_>>();
    let Healed { found, repair } = healed;
    let verified = &found.verification;
    // 0: only parts came so far.
    let as_of_ms = verified.applied.map(|a| a.as_of_ms).filter(|ms| *ms > 0);
    let place = |(root, path): &(coldspare_core::RootId, coldspare_core::RelPath)| json!({"root": roots.get(usize::from(root.0)), "path": path.to_string()});
    let spaces = copy
        .spaces()
        .into_iter()
        .map(|(path, space)| json!({"root": path.display().to_string(), "free_bytes": space.free_bytes, "free_inodes": space.free_inodes}));
    let mut value = json!({
        "verdict": verified.verdict.word(),
        "seq": verified.applied.map(|a| a.seq.0),
        "as_of": as_of_ms.map(crate::active::rfc3339),
        "as_of_ms": as_of_ms,
        "lag_ms": as_of_ms.map(|ms| coldspare_scan::watch::now_ms().saturating_sub(ms)),
        "checked_entries": verified.entries,
        "checked_files": verified.files,
        "checked_bytes": verified.bytes,
        "problems": problems(&verified.problems),
        "held_back": problems(&copy.held_back().map_err(Failure::damage)?),
        "incomplete": copy.incomplete().map_err(Failure::damage)?.iter().map(place).collect::<Vec<_>>(),
        "applying": copy.is_applying(),
        "staged_files": copy.staged_files().map_err(Failure::damage)?,
        "quarantine": copy.quarantined(),
        "space": spaces.collect::<Vec<_>>(),
        "build": crate::BUILD,
    });
    if let Some((git, version)) = &found.git {
        value["git"] = json!({"version": version, "repositories": git.repositories, "references": git.references});
    }
    if let Some(repair) = repair {
        value["repair"] = json!({
            "repaired": problems(&repair.repaired),
            "left": verified.problems.len(),
            "active": repair.fetch.word(),
        });
    }
    Ok(value)
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
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let repair = &found["repair"];
    for (list, what) in [(&found["problems"], ""), (&repair["repaired"], "repaired: "), (&found["held_back"], "held back on the active: ")]
    {
        for p in list.as_array().into_iter().flatten() {
            let root = p["root"].as_str().map(|root| format!("{root}: ")).unwrap_or_default();
            println!("{what}{root}{}: {} ({})", text(&p["path"]), text(&p["kind"]), text(&p["detail"]));
        }
    }
    for p in found["incomplete"].as_array().into_iter().flatten() {
        println!("incomplete: {}: {} (the active has to send it again)", text(&p["root"]), text(&p["path"]));
    }
    for space in found["space"].as_array().into_iter().flatten() {
        let free = indicatif::HumanBytes(space["free_bytes"].as_u64().unwrap_or_default());
        println!("space: {}: {free} free", text(&space["root"]));
    }
    if found["git"].is_object() {
        let git = &found["git"];
        println!("git {}: {} repositories, {} references", text(&git["version"]), git["repositories"], git["references"]);
    }
    if repair["active"] == "unreachable" {
        println!("the active can't be reached: the content that is left is asked for when it connects to `coldspare receive`");
    }
    println!("{}", active::line(&found["active"]));
    let what = if options.asked.deep { "every byte" } else { "metadata" };
    println!(
        "{}: as of {}, {} entries, {} bytes read ({what}), {} problems, {} seconds",
        text(&found["verdict"]),
        found["as_of"].as_str().unwrap_or(if found["seq"].is_null() { "never" } else { "unknown" }),
        found["checked_entries"],
        found["checked_bytes"],
        found["problems"].as_array().map_or(0, Vec::len),
        found["seconds"],
    );
    Ok(())
}
