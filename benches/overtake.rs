//! How soon a push is on the standby while much else is on its way: on loopback, and over a line of 100 Mbit/s and 50 ms.
//!
//! A file that doesn't shrink is put into the home; until the standby's tree has it, one repository is pushed to again and
//! again. A push counts from the time of the reference that it wrote until the standby's tree shows it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use coldspare_sim::line::{Line, Quality};
use coldspare_sim::load::percentile;
use serde_json::{Value, json};

use crate::Settings;
use crate::follow::{GIVE_UP, pause, push_and_wait, pusher};
use crate::home::{self, SEED};
use crate::pair::Pair;
use crate::report::{Result, figure, run};

/// The section that is this part.
pub(crate) const SECTION: &str = "overtake";

/// Pushes that stand alone, for comparison.
const ALONE: usize = 50;
/// LIMIT: pushes while the file is on its way.
const PUSHES_MAX: usize = 1_000;

/// Measures it, if it was asked for.
pub(crate) fn measure_all(settings: &Settings) -> Result<Option<Value>> {
    if !settings.wants(SECTION) {
        return Ok(None);
    }
    let wants = |line: &str| settings.lines.is_empty() || settings.lines.iter().any(|l| l == line);
    println!("| line | what, ms | p50 | p99 | highest | of | the file, MB/s |\n|---|---|---|---|---|---|---|");
    let mut rows = Vec::new();
    if wants("loopback") {
        rows.push(measure(settings, "loopback", None, 2 * settings.packed_bytes)?);
    }
    if wants("50-ms") {
        let line = Line::new(Quality::default(), SEED)?;
        rows.push(measure(settings, "50-ms", Some(&line), settings.line_bytes)?);
    }
    println!();
    Ok(Some(json!({"home": "overtake", "rows": rows})))
}

fn measure(settings: &Settings, name: &str, line: Option<&Line>, bytes: u64) -> Result<Value> {
    let dir = settings.passing_dir(SECTION)?;
    let home = dir.path().join("home");
    fs::create_dir(&home)?;
    let mut pusher = pusher(dir.path(), &home)?;
    let at = dir.path().join("pair");
    fs::create_dir(&at)?;
    let pair = match line {
        Some(line) => Pair::across(line, &home, &at)?,
        None => Pair::make(&home, &at)?,
    };
    let (_receiver, _sender) = (pair.receive()?, pair.send()?);
    let mut push = |no: usize| -> Result<f64> {
        std::thread::sleep(pause(no));
        push_and_wait(&mut pusher, &home, &pair.destination, GIVE_UP)
    };
    push(0)?;
    run(&mut pair.on_active(&["checkpoint", "--timeout", "300s"]))?;
    let alone: Result<Vec<f64>> = (0..ALONE).map(&mut push).collect();
    // At once: one that grows while it is read is read more than once.
    let outside = dir.path().join("noise");
    home::make_noise(&outside, bytes, SEED)?;
    // Else the standby's syncs write what the bench wrote: here both are on one disk.
    run(Command::new("sync").arg("-f").arg(&outside))?;
    let large = Path::new("shared/data/large");
    fs::create_dir_all(home.join("shared/data"))?;
    let start = Instant::now();
    fs::rename(&outside, home.join(large))?;
    let mut beside = Vec::new();
    while !pair.destination.join(large).exists() {
        if beside.len() >= PUSHES_MAX {
            return Err(format!("{name}: the file isn't there after {PUSHES_MAX} pushes").into());
        }
        beside.push(push(beside.len())?);
    }
    let rate = bytes as f64 / 1e6 / start.elapsed().as_secs_f64();
    run(&mut pair.on_active(&["checkpoint", "--timeout", "300s"]))?;
    for (what, ms, rate) in [("push alone", alone?, String::new()), ("push beside the file", beside.clone(), figure(rate))] {
        let mut sorted = ms;
        sorted.sort_by(f64::total_cmp);
        let [p50, p99, highest] = [50, 99, 100].map(|p| figure(percentile(&sorted, p)));
        println!("| {name} | {what} | {p50} | {p99} | {highest} | {} | {rate} |", sorted.len());
    }
    Ok(json!({"line": name, "bytes": bytes, "ms": beside, "megabytes_per_second": rate}))
}
