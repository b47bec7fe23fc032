//! How much of a long, slow or lossy line is used: coldspare with each of its ways to find the rate, and rsync over TCP.
//!
//! The line is emulated packet by packet (`coldspare_sim::line`), a new one for each transfer, with the same seed. A
//! share is content by time and rate of the line: of all of the transfer, from the start of the command until everything is
//! durable, and of the middle of it, from a tenth of the bytes to nine. Of a transfer that is ended because it takes too long,
//! all that passed the line counts, headers too.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use coldspare_sim::line::{FAR, Line, NEAR, Quality};
use serde_json::{Value, json};

use crate::Settings;
use crate::home::{self, SEED};
use crate::pair::{Pair, RsyncDaemon, check_equal};
use crate::report::{Result, run, spread};

/// The section that is this part.
pub(crate) const SECTION: &str = "link";

/// Who sends, and how the rate is found.
const TOOLS: [(&str, &str); 4] = [("coldspare", "cubic"), ("coldspare", "bbr"), ("rsync", "cubic"), ("rsync", "bbr")];

fn lines() -> Vec<(&'static str, Quality)> {
    let line = |loss_ppm| Quality { loss_ppm, ..Quality::default() };
    vec![
        ("loss-0", line(0)),
        ("loss-1", line(10_000)),
        ("loss-5", line(50_000)),
        ("300-ms", Quality { round_trip: Duration::from_millis(300), ..line(0) }),
        ("300-ms-loss-1", Quality { round_trip: Duration::from_millis(300), ..line(10_000) }),
        ("mtu-1280", Quality { mtu: 1280, ..line(0) }),
    ]
}

/// Measures it, if it was asked for.
pub(crate) fn measure_all(settings: &Settings, has_rsync: bool) -> Result<Option<Value>> {
    if !settings.wants(SECTION) {
        return Ok(None);
    }
    if !Line::is_possible() {
        return Err("lines are emulated with network namespaces: that needs root and /dev/net/tun".into());
    }
    let dir = settings.passing_dir(SECTION)?;
    let source = dir.path().join("home");
    fs::create_dir(&source)?;
    let made = home::make_packed(&source, settings.line_bytes, SEED)?;
    let chosen: Vec<_> =
        lines().into_iter().filter(|(name, _)| settings.lines.is_empty() || settings.lines.iter().any(|l| l == name)).collect();
    println!(
        "link: {} files, {:.0} MB, 100 Mbit/s\n\n| line | {} |",
        made.files,
        made.bytes as f64 / 1e6,
        TOOLS.map(|(a, b)| format!("{a}, {b}")).join(" | ")
    );
    println!("|---|---|---|---|---|");
    let mut rows = Vec::new();
    for (name, quality) in chosen {
        let mut shares = TOOLS.map(|_| Vec::new());
        for _ in 0..settings.line_runs.unwrap_or(settings.runs) {
            for ((tool, congestion), shares) in TOOLS.iter().zip(&mut shares) {
                if *tool == "rsync" && !has_rsync {
                    continue;
                }
                let at = tempfile::Builder::new().prefix("run-").tempdir_in(dir.path())?;
                let line = Line::new(quality.clone(), SEED)?;
                let share = match *tool {
                    "rsync" => by_rsync(&line, congestion, &source, at.path(), settings.transfer_max),
                    _ => by_coldspare(&line, congestion, &source, at.path(), settings.transfer_max),
                };
                let share = share?.of(quality.bits_per_second);
                eprintln!("{name}: {tool}, {congestion}: {share:?}; {:?}", line.there());
                shares.push(share);
            }
        }
        let cells = shares.each_ref().map(|shares| {
            let column = |no: usize| spread(&shares.iter().map(|share: &Rate| share.0[no]).collect::<Vec<_>>());
            if shares.is_empty() { "-".into() } else { format!("{}, {}", column(0), column(1)) }
        });
        println!("| {name} | {} |", cells.join(" | "));
        rows.push(json!({"line": name, "shares": shares.map(|shares| shares.iter().map(|share| share.0).collect::<Vec<_>>())}));
    }
    println!();
    Ok(Some(json!({"home": "link", "bytes": made.bytes, "tools": TOOLS, "rows": rows})))
}

/// Bytes a second, or a share: of all, and of the middle.
#[derive(Debug, Clone, Copy)]
struct Rate([f64; 2]);

impl Rate {
    fn of(self, bits_per_second: u64) -> Rate {
        Rate(self.0.map(|rate| rate * 8.0 / bits_per_second as f64))
    }
}

fn by_coldspare(line: &Line, congestion: &str, source: &Path, at: &Path, longest: Duration) -> Result<Rate> {
    let pair = Pair::across(line, source, at)?;
    pair.configure(&format!("[link]\ncongestion = \"{congestion}\"\n"))?;
    let _receiver = pair.receive()?;
    transfer(&mut pair.send_once(), line, source, &pair.destination, longest)
}

/// With `sync -f` of what arrived.
fn by_rsync(line: &Line, congestion: &str, source: &Path, at: &Path, longest: Duration) -> Result<Rate> {
    for (end, peer) in [(line.near(), FAR), (line.far(), NEAR)] {
        // By the route: a namespace may not choose any that the host hasn't made everybody's.
        end.enter(|| Ok(run(Command::new("ip").args(["route", "show", "to", peer])).map_err(|e| e.to_string())))?.and_then(|route| {
            let mut command = Command::new("ip");
            command.args(["route", "replace"]).args(route.split_whitespace()).args(["congctl", congestion]);
            end.enter(|| Ok(run(&mut command).map_err(|e| e.to_string()))).map_err(|e| e.to_string())?
        })?;
    }
    let peer = RsyncDaemon::across(line, at)?;
    let wrapper = line.near().wrapper();
    let mut command = Command::new(&wrapper[0]);
    command.args(&wrapper[1..]).args(["rsync", "-aHAX", "--delete", "--exclude=/.coldspare"]);
    transfer(command.arg(format!("{}/", source.display())).arg(&peer.url), line, source, &peer.destination, longest)
}

fn transfer(command: &mut Command, line: &Line, source: &Path, destination: &Path, longest: Duration) -> Result<Rate> {
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    let mut arrived = Vec::new();
    let is_whole = loop {
        arrived.push((start.elapsed().as_secs_f64(), line.there().arrived_bytes.load(Ordering::Relaxed)));
        if let Some(status) = child.try_wait()? {
            if !status.success() {
                return Err(format!("{command:?}: {status}").into());
            }
            break true;
        }
        if start.elapsed() > longest {
            child.kill()?;
            child.wait()?;
            break false;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    run(Command::new("sync").arg("-f").arg(destination))?;
    let seconds = start.elapsed().as_secs_f64();
    if is_whole {
        check_equal(source, destination)?;
    }
    let all = arrived.last().map_or(0, |&(_, bytes)| bytes);
    let content = if is_whole { bytes_below(source)? } else { all } as f64;
    let when = |tenths: u64| arrived.iter().find(|(_, bytes)| *bytes >= all * tenths / 10).map_or(0.0, |&(at, _)| at);
    Ok(Rate([content / seconds, 0.8 * content / (when(9) - when(1))]))
}

/// Bytes of files.
fn bytes_below(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in walkdir::WalkDir::new(dir) {
        let metadata = entry?.metadata()?;
        if metadata.is_file() {
            bytes += metadata.len();
        }
    }
    Ok(bytes)
}
