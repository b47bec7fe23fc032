//! How much of a long, slow or lossy line is used: coldspare with each of its ways to find the rate, and rsync over TCP.
//!
//! The line is emulated packet by packet (`coldspare_sim::line`), a new one for each transfer, with the same seed. A
//! share is content that is there at the end, by time and rate of the line; all of the transfer counts, from the start of
//! the command until everything is durable.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use coldspare_sim::line::{Line, Quality};
use serde_json::{Value, json};

use crate::Settings;
use crate::home::{self, SEED};
use crate::pair::{Pair, RsyncDaemon, check_equal};
use crate::report::{Result, median, run, spread};

/// The section that is this part.
pub(crate) const SECTION: &str = "link";

/// Content that is sent: half a minute of the line.
const BYTES: u64 = 400_000_000;
/// How long a transfer may take before it is ended, and what is there by then counts.
const GIVE_UP: Duration = Duration::from_secs(60);
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
    let dir = tempfile::Builder::new().prefix("coldspare-link-").tempdir_in(&settings.dir)?;
    let source = dir.path().join("home");
    fs::create_dir(&source)?;
    let made = home::make_packed(&source, BYTES, SEED)?;
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
        for _ in 0..settings.runs {
            for ((tool, congestion), shares) in TOOLS.iter().zip(&mut shares) {
                if *tool == "rsync" && !has_rsync {
                    continue;
                }
                let at = tempfile::Builder::new().prefix("run-").tempdir_in(dir.path())?;
                let line = Line::new(quality.clone(), SEED)?;
                let share = match *tool {
                    "rsync" => by_rsync(&line, congestion, &source, at.path()),
                    _ => by_coldspare(&line, congestion, &source, at.path()),
                };
                let share = share? * 8.0 / quality.bits_per_second as f64;
                eprintln!("{name}: {tool}, {congestion}: {share:.3}; {:?}", line.there());
                shares.push(share);
            }
        }
        println!("| {name} | {} |", shares.each_ref().map(|shares| spread(shares)).join(" | "));
        rows.push(json!({"line": name, "shares": shares, "medians": shares.each_ref().map(|shares| median(shares))}));
    }
    println!();
    Ok(Some(json!({"home": "link", "bytes": made.bytes, "tools": TOOLS, "rows": rows})))
}

/// Bytes a second.
fn by_coldspare(line: &Line, congestion: &str, source: &Path, at: &Path) -> Result<f64> {
    let pair = Pair::across(line, source, at)?;
    pair.configure(&format!("[link]\ncongestion = \"{congestion}\"\n"))?;
    let _receiver = pair.receive()?;
    transfer(&mut pair.send_once(), source, &pair.destination)
}

/// Bytes a second; with `sync -f` of what arrived.
fn by_rsync(line: &Line, congestion: &str, source: &Path, at: &Path) -> Result<f64> {
    for end in [line.near(), line.far()] {
        end.enter(|| fs::write("/proc/sys/net/ipv4/tcp_congestion_control", congestion))?;
    }
    let peer = RsyncDaemon::across(line, at)?;
    let wrapper = line.near().wrapper();
    let mut command = Command::new(&wrapper[0]);
    command.args(&wrapper[1..]).args(["rsync", "-aHAX", "--delete", "--exclude=/.coldspare"]);
    transfer(command.arg(format!("{}/", source.display())).arg(&peer.url), source, &peer.destination)
}

fn transfer(command: &mut Command, source: &Path, destination: &Path) -> Result<f64> {
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    let is_whole = loop {
        if let Some(status) = child.try_wait()? {
            if !status.success() {
                return Err(format!("{command:?}: {status}").into());
            }
            break true;
        }
        if start.elapsed() > GIVE_UP {
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
        return Ok(bytes_below(source)? as f64 / seconds);
    }
    Ok(bytes_below(destination)? as f64 / seconds)
}

/// Bytes of files that are on the disk.
fn bytes_below(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in walkdir::WalkDir::new(dir) {
        let metadata = entry?.metadata()?;
        if metadata.is_file() {
            bytes += metadata.len().min(metadata.blocks() * 512);
        }
    }
    Ok(bytes)
}
