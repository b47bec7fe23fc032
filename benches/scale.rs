//! What a home of many entries costs: the seed, a look that finds nothing, the watch, the daemons while nothing happens.

use std::fs;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use crate::Settings;
use crate::home::{self, SEED};
use crate::pair::{Pair, RsyncDaemon};
use crate::process::{MIB, measure};
use crate::report::{Result, figure, run};

/// The section that is this part.
pub(crate) const SECTION: &str = "scale";

/// Measures it, if it was asked for.
pub(crate) fn measure_all(settings: &Settings, has_rsync: bool) -> Result<Option<Value>> {
    if !settings.wants(SECTION) {
        return Ok(None);
    }
    let dir = settings.lasting_dir(SECTION)?;
    let source = dir.join("home");
    fs::create_dir(&source)?;
    let made = home::make_wide(&source, settings.entries, SEED)?;
    let mut rows = Rows { home: format!("{} entries, {} of them files", settings.entries, made.files), rows: Vec::new() };
    eprintln!("{}", rows.home);
    let at = dir.join("coldspare");
    fs::create_dir(&at)?;
    let pair = Pair::make(&source, &at)?;
    {
        let receiver = pair.receive()?;
        let seed = measure(&mut pair.send_once(), &receiver)?;
        rows.add("seed, s", seed.seconds);
        rows.add("peak memory, sender, seed, MiB", seed.client_peak_bytes as f64 / MIB);
        rows.add("peak memory, receiver, seed, MiB", seed.daemon_peak_bytes as f64 / MIB);
        rows.add("memory of the receiver after the seed, MiB", receiver.resident_bytes() as f64 / MIB);
    }
    let receiver = pair.receive()?;
    let rescan = measure(&mut pair.send_once(), &receiver)?;
    rows.add("rescan, nothing changed, s", rescan.seconds);
    for backend in ["fanotify", "inotify"] {
        pair.watch_by(backend)?;
        let start = Instant::now();
        let sender = pair.send()?;
        rows.add(&format!("{backend}: the daemon is ready, s"), start.elapsed().as_secs_f64());
        run(&mut pair.on_active(&["checkpoint", "--timeout", "600s"]))?;
        rows.add(&format!("{backend}: from the start to the first checkpoint, s"), start.elapsed().as_secs_f64());
        let status: Value = serde_json::from_str(&run(&mut pair.on_active(&["status", "--json"]))?)?;
        if status["watch"]["backend"].as_str() != Some(backend) {
            return Err(format!("{backend} is not to be had here: {}", status["watch"]["why"]).into());
        }
        rows.add(&format!("{backend}: what is watched"), status["watch"]["watched"].as_f64().unwrap_or(f64::NAN));
        let (before, start) = (sender.cpu_seconds()? + receiver.cpu_seconds()?, Instant::now());
        std::thread::sleep(settings.idle);
        let used = sender.cpu_seconds()? + receiver.cpu_seconds()? - before;
        rows.add(&format!("{backend}: CPU of both while idle, % of a core"), used / start.elapsed().as_secs_f64() * 100.0);
        rows.add(&format!("{backend}: memory of the sender while idle, MiB"), sender.resident_bytes() as f64 / MIB);
        rows.add(&format!("{backend}: peak memory of the sender, MiB"), sender.peak_bytes() as f64 / MIB);
    }
    rows.add("memory of the receiver while idle, MiB", receiver.resident_bytes() as f64 / MIB);
    drop(receiver);
    if has_rsync {
        let at = dir.join("rsync");
        fs::create_dir(&at)?;
        let peer = RsyncDaemon::start(&at)?;
        let push = || {
            let mut command = Command::new("rsync");
            command.args(["-aHAX", "--delete", "--exclude=/.coldspare"]).arg(format!("{}/", source.display())).arg(&peer.url);
            measure(&mut command, &peer.daemon)
        };
        let seed = push()?;
        rows.add("rsync: seed, not durable, s", seed.seconds);
        let again = push()?;
        rows.add("rsync: rescan, nothing changed, s", again.seconds);
        rows.add("rescan, ratio to rsync's", rescan.seconds / again.seconds);
    }
    Ok(Some(rows.print()))
}

struct Rows {
    home: String,
    rows: Vec<(String, f64)>,
}

impl Rows {
    fn add(&mut self, what: &str, value: f64) {
        eprintln!("{what}: {}", figure(value));
        self.rows.push((what.into(), value));
    }

    fn print(&self) -> Value {
        println!("{}\n\n| what | value |\n|---|---|", self.home);
        for (what, value) in &self.rows {
            println!("| {what} | {} |", figure(*value));
        }
        println!();
        json!({"home": self.home, "rows": self.rows})
    }
}
