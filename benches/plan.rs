//! What `coldspare plan` says before, beside what then happens: three homes, each about ten times as large as the one
//! before, of loose objects and of repositories with a history.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use crate::Settings;
use crate::home;
use crate::pair::{Pair, check_equal, coldspare};
use crate::process::measure;
use crate::repack::{git, grow};
use crate::report::{Result, figure, run};

/// The section that is this part.
pub(crate) const SECTION: &str = "plan";

/// By how much the loose objects of a home are fewer than those of the largest, and how many histories it has.
const HOMES: [(u64, usize); 3] = [(100, 1), (10, 3), (1, 10)];

/// Measures it, if it was asked for.
pub(crate) fn measure_all(settings: &Settings) -> Result<Option<Value>> {
    if !settings.wants(SECTION) {
        return Ok(None);
    }
    let dir = settings.lasting_dir(SECTION)?;
    let grown = dir.join("grown");
    grow(&grown, settings.repository.as_deref(), settings.commits, &dir)?;
    println!("| entries | MB | what | predicted | measured | ratio |\n|---|---|---|---|---|---|");
    let mut rows = Vec::new();
    for (no, (fewer, histories)) in HOMES.into_iter().take(settings.planned).enumerate() {
        let at = dir.join(no.to_string());
        let source = at.join("home");
        fs::create_dir_all(&source)?;
        let made = home::make_loose(&source, settings.files / fewer, home::SEED + no as u64)?;
        let repositories = source.join("shared/data/repositories");
        let histories: Vec<_> = (0..histories).map(|n| repositories.join(format!("{}", 1_000 + n))).collect();
        for to in &histories {
            run(Command::new("cp").arg("-a").arg(&grown).arg(to))?;
        }
        run(Command::new("sync").arg("-f").arg(&at))?;
        let plan = run(coldspare(&[]).args(["plan", "--json", "--home"]).arg(&source).arg("--scratch").arg(at.join("scratch")))?;
        let plan: Value = serde_json::from_str(&plan)?;
        let expected = |what: &str| -> Result<f64> {
            let found = plan["figures"].as_array().into_iter().flatten().find(|f| f["what"].as_str().is_some_and(|w| w.starts_with(what)));
            found.and_then(|f| f["value"].as_f64()).ok_or_else(|| format!("the plan has no {what:?}").into())
        };

        let pair = Pair::make(&source, &at)?;
        let receiver = pair.receive()?;
        let started = Instant::now();
        let seed = measure(&mut pair.send_once(), &receiver)?;
        let seconds = started.elapsed().as_secs_f64();
        check_equal(&source, &pair.destination)?;
        for repository in &histories {
            run(git(repository).args(["repack", "-q", "-a", "-d", "--no-write-bitmap-index"]))?;
        }
        let night = measure(&mut pair.send_once(), &receiver)?;
        let sent = |told: &str| -> Result<f64> {
            serde_json::from_str::<Value>(told)?["bytes_sent"].as_f64().ok_or_else(|| "no bytes_sent".into())
        };
        // Of the plan's night only the histories are repacked here: the loose objects belong to nothing.
        let share = histories_share(&plan, &grown, histories.len())?;
        let found = [
            ("seed, s", expected("seed, both hosts")?, seconds),
            ("seed, sent, MB", expected("seed, bytes")? / 1e6, sent(&seed.stdout)? / 1e6),
            ("seed, CPU of the active, s", expected("seed, CPU of the active")?, seed.client_cpu_seconds),
            ("seed, CPU of the standby, s", expected("seed, CPU of the standby")?, seed.daemon_cpu_seconds),
            ("night of a repack, sent, MB", expected("a night")? * share / 1e6, sent(&night.stdout)? / 1e6),
        ];
        let entries = plan["survey"]["entries"].as_u64().unwrap_or_default();
        let megabytes = (made.bytes as f64 + bytes_of_packs(&grown)? * histories.len() as f64) / 1e6;
        for (what, predicted, measured) in found {
            let ratio = predicted / measured;
            println!("| {entries} | {megabytes:.0} | {what} | {} | {} | {ratio:.2} |", figure(predicted), figure(measured));
            rows.push(json!({"entries": entries, "what": what, "predicted": predicted, "measured": measured, "ratio": ratio}));
        }
    }
    println!();
    Ok(Some(json!({"home": "plan", "rows": rows})))
}

/// Which part of all that git could repack is in the histories.
fn histories_share(plan: &Value, grown: &Path, histories: usize) -> Result<f64> {
    let all = plan["survey"]["packs"]["bytes"].as_f64().unwrap_or_default() + plan["survey"]["loose"]["bytes"].as_f64().unwrap_or_default();
    Ok(bytes_of_packs(grown)? * histories as f64 / all.max(1.0))
}

fn bytes_of_packs(repository: &Path) -> Result<f64> {
    let mut bytes = 0;
    for entry in fs::read_dir(repository.join("objects/pack"))? {
        bytes += entry?.metadata()?.len();
    }
    Ok(bytes as f64)
}
