//! From an empty destination to a second run that finds nothing to do: coldspare and an rsync daemon, in turn.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use crate::Settings;
use crate::home::{self, Made, SEED};
use crate::pair::{Pair, RsyncDaemon, check_equal};
use crate::process::{Cost, MIB, measure};
use crate::report::{Result, median, run, spread};

/// The sections that are of this part.
pub(crate) const SECTIONS: [&str; 4] = ["seed", "rescan", "memory", "packed"];

/// Measures what was asked for of it, on a home for each kind.
pub(crate) fn compare_all(settings: &Settings, has_rsync: bool) -> Result<Vec<Value>> {
    let mut tables = Vec::new();
    if ["seed", "rescan", "memory"].iter().any(|section| settings.wants(section)) {
        let dir = settings.lasting_dir("loose")?;
        tables.push(compare("loose", &dir, settings, has_rsync, |home| home::make_loose(home, settings.files, SEED))?);
    }
    if settings.wants("packed") {
        let dir = settings.passing_dir("packed")?;
        tables.push(compare("packed", dir.path(), settings, has_rsync, |home| home::make_packed(home, settings.packed_bytes, SEED))?);
    }
    Ok(tables)
}

/// One tool's way from an empty destination to a second run that finds nothing to do.
struct Run {
    seed: Cost,
    rescan: Cost,
    bytes_sent: u64,
}

#[derive(Default)]
struct Runs {
    coldspare: Vec<Run>,
    rsync: Vec<Run>,
}

/// Makes a home, runs the tools on it in turn and prints the table.
fn compare(name: &str, dir: &Path, settings: &Settings, has_rsync: bool, make: impl Fn(&Path) -> std::io::Result<Made>) -> Result<Value> {
    let source = dir.join("home");
    fs::create_dir(&source)?;
    let made = make(&source)?;
    println!("{name}: {} files, {:.0} MB of content\n", made.files, made.bytes as f64 / 1e6);
    let mut runs = Runs::default();
    for no in 1..=settings.runs {
        runs.coldspare.push(in_fresh(dir, |at| run_coldspare(&source, at))?);
        if has_rsync {
            runs.rsync.push(in_fresh(dir, |at| run_rsync(&source, at))?);
        }
        let seconds = |runs: &[Run]| runs.last().map_or("-".into(), |r| format!("{:.2} s", r.seed.seconds));
        eprintln!("{name}, run {no}: seed coldspare {}, rsync {}", seconds(&runs.coldspare), seconds(&runs.rsync));
    }
    let wants = |section: &str| name == "packed" || settings.wants(section);
    Ok(json!({"home": name, "files": made.files, "bytes": made.bytes, "rows": print_table(&runs, wants)}))
}

/// Runs `work` in a new folder, which stays, with nothing of an earlier run left to be written.
fn in_fresh<T>(dir: &Path, work: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let at = tempfile::Builder::new().prefix("run-").tempdir_in(dir)?.keep();
    run(Command::new("sync").arg("-f").arg(dir))?;
    work(&at)
}

fn run_coldspare(source: &Path, at: &Path) -> Result<Run> {
    let pair = Pair::make(source, at)?;
    let daemon = pair.receive()?;
    let seed = measure(&mut pair.send_once(), &daemon)?;
    let rescan = measure(&mut pair.send_once(), &daemon)?;
    drop(daemon);
    check_equal(source, &pair.destination)?;
    let told: Value = serde_json::from_str(&seed.stdout)?;
    let bytes_sent = told["bytes_sent"].as_u64().ok_or("no bytes_sent in the output of send")?;
    Ok(Run { seed, rescan, bytes_sent })
}

fn run_rsync(source: &Path, at: &Path) -> Result<Run> {
    let peer = RsyncDaemon::start(at)?;
    let push = || {
        let mut command = Command::new("rsync");
        command.args(["-aHAX", "--delete", "--stats", "--exclude=/.coldspare"]);
        command.arg(format!("{}/", source.display())).arg(&peer.url);
        command
    };
    let mut seed = measure(&mut push(), &peer.daemon)?;
    let start = Instant::now();
    run(Command::new("sync").arg("-f").arg(&peer.destination))?;
    seed.seconds += start.elapsed().as_secs_f64();
    let rescan = measure(&mut push(), &peer.daemon)?;
    let destination = peer.destination.clone();
    drop(peer);
    check_equal(source, &destination)?;
    let told = seed.stdout.lines().find_map(|line| line.strip_prefix("Total bytes sent:")).ok_or("no total in rsync's output")?;
    let bytes_sent = told.chars().filter(char::is_ascii_digit).collect::<String>().parse()?;
    Ok(Run { seed, rescan, bytes_sent })
}

/// What is measured: a key for JSON, words for the table, and how it is read from a run.
type Row = (&'static str, &'static str, fn(&Run) -> f64);

/// Prints the rows that are wanted and gives them back with every run's value.
fn print_table(runs: &Runs, wants: impl Fn(&str) -> bool) -> Vec<Value> {
    let rows: [Row; 9] = [
        ("seed", "seed, durable, s", |r| r.seed.seconds),
        ("seed", "seed, CPU of the sending side, s", |r| r.seed.client_cpu_seconds),
        ("seed", "seed, CPU of the receiving side, s", |r| r.seed.daemon_cpu_seconds),
        ("seed", "seed, sent, MB", |r| r.bytes_sent as f64 / 1e6),
        ("rescan", "rescan, nothing changed, s", |r| r.rescan.seconds),
        ("rescan", "rescan, CPU of both sides, s", |r| r.rescan.client_cpu_seconds + r.rescan.daemon_cpu_seconds),
        ("memory", "peak memory, sender, seed, MiB", |r| r.seed.client_peak_bytes as f64 / MIB),
        ("memory", "peak memory, receiver, seed, MiB", |r| r.seed.daemon_peak_bytes as f64 / MIB),
        ("memory", "peak memory, sender, rescan, MiB", |r| r.rescan.client_peak_bytes as f64 / MIB),
    ];
    println!("| what | coldspare | rsync | ratio |\n|---|---|---|---|");
    let mut out = Vec::new();
    for (section, what, of) in rows {
        if !wants(section) {
            continue;
        }
        let coldspare: Vec<f64> = runs.coldspare.iter().map(of).collect();
        let rsync: Vec<f64> = runs.rsync.iter().map(of).collect();
        let ratio = if rsync.is_empty() { None } else { Some(median(&coldspare) / median(&rsync)) };
        let shown = ratio.map_or("-".into(), |r| format!("{r:.2}"));
        println!("| {what} | {} | {} | {shown} |", spread(&coldspare), spread(&rsync));
        out.push(json!({"what": what, "coldspare": coldspare, "rsync": rsync, "ratio": ratio}));
    }
    println!();
    out
}
