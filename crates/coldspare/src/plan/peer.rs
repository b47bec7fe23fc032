//! The rehearsal with a throw-away standby on another host, so that the link and that host's disk are in what it costs.
//!
//! One standby serves all of it, so its phases follow each other on one pair: what one leaves is there in the next.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use coldspare_transport::Invitation;
use serde_json::Value;

use super::model::{Costs, MeasuredLink};
use super::rehearsal::{Changes, Cost, Phases, bytes_below, cpu_seconds, lone_changes, sent};
use super::samples::{copy_repository, copy_samples, fitting_repository, pick_large, pick_small, written_by_repack};
use super::survey::{Amount, Samples};
use crate::demo::home::make_dir;
use crate::demo::host::{Host, INTERRUPTED, failed};
use crate::exit::{Code, Failure, Outcome};
use crate::socket::Request;

/// The second root of both ends: no pair in earnest has one of that name, so neither end can be taken for one.
const ROOT: &str = "plan-rehearsal";
/// How long something may be in the way before the rehearsal ends.
const TROUBLE_LIMIT: Duration = Duration::from_secs(30);
/// How long one phase may take: 192 MB at 1 Mbit/s.
const PHASE_LIMIT: Duration = Duration::from_secs(30 * 60);
/// Between two looks at what is in the way.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks at the standby of a rehearsal.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Serves as the standby of a rehearsal below `scratch`, until a signal; prints the invitation.
///
/// # Errors
/// `Usage`: the folder or the address can't be used. What the daemon ended with.
pub(crate) fn serve(listen: &str, advertise: Option<&str>, scratch: &Path) -> Outcome {
    let mut standby = Host::new(scratch, "standby", "receive")?.with_store_named(ROOT);
    let advertise = advertise.map(|address| ["--advertise", address]);
    let invitation = standby.init("standby", &[&["--listen", listen][..], advertise.as_ref().map_or(&[], |a| &a[..])].concat())?;
    standby.start()?;
    writeln!(std::io::stdout(), "{}", invitation.trim()).map_err(Failure::usage)?;
    say("on the active's host: coldspare plan --home DIR --invite INVITATION");
    say(&format!("for one rehearsal; then end this one by Ctrl-C, and {} is removed", scratch.display()));
    let mut last = None;
    while !INTERRUPTED.load(Ordering::Relaxed) {
        if let Some(ended) = standby.ended() {
            // A terminal interrupts both.
            std::thread::sleep(LOOK_EVERY);
            if INTERRUPTED.load(Ordering::Relaxed) {
                break;
            }
            return Err(ended);
        }
        last = standby.status().map(|status| (status, cpu_seconds(&standby), bytes_below(&standby.state()))).or(last);
        std::thread::sleep(LOOK_EVERY);
    }
    if let Some((status, cpu, state)) = last {
        let entries = status["entries"].as_u64().unwrap_or_default();
        say(&format!("held {entries} entries at the end, in {:.0} kB of state; its daemon took {cpu:.1} s of CPU", state / 1e3));
    }
    Ok(Code::Done)
}

/// Tells whoever still listens: a terminal that is gone is no reason to leave anything behind.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Rehearses with files of the home against the standby that invited, from below `scratch`.
///
/// # Errors
/// `Usage`: the folder can't be used. `Unreachable`: the standby isn't reached. `Fenced`: the invitation is used up, or of another
/// pair. `Damage`: the standby can't take it, such as for lack of room.
pub(crate) fn rehearse(samples: &Samples, scratch: &Path, invitation: &Invitation) -> Result<Costs, Failure> {
    let dir = scratch.join("peer");
    make_dir(&dir)?;
    let active = Host::new(&dir, "active", "send")?.with_store_named(ROOT);
    active.init("active", &["--invite", &invitation.to_string()])?;
    let mut pair = PeerPair { active, address: invitation.address.clone() };
    // The first contact pairs; what a start costs is measured at the second, as the phases start.
    pair.phase(Amount::default())?;
    let nothing = pair.phase(Amount::default())?;
    let small = pair.phase_with(|home| copy_samples(&pick_small(samples), home))?;
    let large = pair.phase_with(|home| copy_samples(&pick_large(samples), home))?;
    let phases = Phases { nothing, small, large };
    phases.check(samples)?;
    let (seconds_per_change, round_trip_seconds) = pair.lone_changes()?;
    let sent_per_repacked_byte = pair.repack(samples)?;
    let seconds = large.seconds - nothing.seconds;
    let sent = large.sent - nothing.sent;
    let bytes_per_second = (sent >= LINK_BYTES_MIN && seconds > 0.0).then_some(sent / seconds);
    let changes = Changes { seconds_per_change, sent_per_repacked_byte };
    Ok(phases.costs(changes, Some(MeasuredLink { bytes_per_second, round_trip_seconds })))
}

/// With fewer bytes the start of a daemon and of a connection is most of the time.
const LINK_BYTES_MIN: f64 = 16e6;

/// The active of a rehearsal, and where its standby is.
struct PeerPair {
    active: Host,
    address: String,
}

impl PeerPair {
    /// A phase with files that `fill` puts into the home first.
    fn phase_with(&mut self, fill: impl FnOnce(&Path) -> Result<Amount, Failure>) -> Result<Cost, Failure> {
        let before = entries_below(&self.active.files.home);
        let amount = fill(&self.active.files.home)?;
        let cost = self.phase(amount)?;
        Ok(Cost { entries: entries_below(&self.active.files.home).saturating_sub(before), ..cost })
    }

    /// Starts the active, waits until the standby has all there is, and stops it.
    fn phase(&mut self, amount: Amount) -> Result<Cost, Failure> {
        let started = Instant::now();
        self.active.start().map_err(|e| self.explained(e))?;
        self.settle()?;
        let seconds = started.elapsed().as_secs_f64();
        let (sent, active_cpu) = (sent(&self.active), cpu_seconds(&self.active));
        self.active.kill();
        let index_bytes = bytes_below(&self.active.state());
        Ok(Cost { amount, entries: 0, seconds, active_cpu, sent, index_bytes, standby: None })
    }

    /// Waits until the standby has all that is in the home; what the checkpoint said.
    fn settle(&mut self) -> Result<Value, Failure> {
        let deadline = Instant::now() + PHASE_LIMIT;
        // Since when, and whether the standby was reached meanwhile.
        let mut in_the_way: Option<(Instant, bool)> = None;
        let request = Request::Checkpoint { timeout_ms: CHECKPOINT_LIMIT.as_millis() as u64 };
        loop {
            if INTERRUPTED.load(Ordering::Relaxed) {
                return Err(failed("interrupted"));
            }
            if let Some(ended) = self.active.ended() {
                return Err(self.explained(ended));
            }
            if let Ok(Some(done)) = self.active.ask(&request, CHECKPOINT_LIMIT * 2) {
                return Ok(done);
            }
            let status = self.active.status().unwrap_or_default();
            let trouble = status["trouble"].as_str().map(String::from);
            let is_connected = status["connected"] == true;
            if is_connected && trouble.is_none() {
                in_the_way = None;
            } else {
                let (since, is_reached) = in_the_way.get_or_insert((Instant::now(), false));
                *is_reached |= is_connected;
                if since.elapsed() > TROUBLE_LIMIT {
                    let why = trouble.unwrap_or_else(|| "it doesn't answer".into());
                    return Err(if *is_reached { self.refused(&why) } else { self.unreachable(&why) });
                }
            }
            if Instant::now() > deadline {
                return Err(failed(format!(
                    "the link to the standby of the rehearsal, {}, is too slow for it: {} min were not enough for one part",
                    self.address,
                    PHASE_LIMIT.as_secs() / 60
                )));
            }
        }
    }

    fn unreachable(&self, why: &str) -> Failure {
        let address = &self.address;
        Failure::unreachable(format!(
            "the standby of the rehearsal, {address}, isn't reached: {why}; does `coldspare plan-peer` still run there, is that address its \
             own, and does UDP pass?"
        ))
    }

    fn refused(&self, why: &str) -> Failure {
        Failure::damage(format!(
            "the standby of the rehearsal, {}, can't take it: {why}; start `coldspare plan-peer` anew, with a --scratch that has room",
            self.address
        ))
    }

    /// What the daemon ended with, and what to do for a rehearsal.
    fn explained(&self, ended: Failure) -> Failure {
        match ended.code {
            Code::Unreachable => self.unreachable(&ended.message),
            Code::Fenced => Failure::fenced(format!(
                "the standby of the rehearsal, {}, refuses: {}; an invitation is good for one rehearsal: start `coldspare plan-peer` anew",
                self.address, ended.message
            )),
            _ => ended,
        }
    }

    /// The median time until a small file is durable on the standby, and the link's round trip, in seconds.
    fn lone_changes(&mut self) -> Result<(f64, Option<f64>), Failure> {
        self.active.start().map_err(|e| self.explained(e))?;
        self.settle()?;
        let seconds = {
            let home = self.active.files.home.clone();
            lone_changes(&home, || {
                let started = Instant::now();
                self.settle().map(|_| started.elapsed().as_secs_f64())
            })?
        };
        let round_trip = self.active.status().and_then(|status| status["peer"]["rtt_ms"].as_f64());
        self.active.kill();
        Ok((seconds, round_trip.map(|ms| ms / 1e3)))
    }

    /// Bytes that travel a byte that `git repack -ad` writes; `None` as in a rehearsal on one host.
    fn repack(&mut self, samples: &Samples) -> Result<Option<f64>, Failure> {
        let Some(from) = fitting_repository(samples) else { return Ok(None) };
        let repository = self.active.files.home.join("shared/data/repositories/repacked");
        copy_repository(from, &repository)?;
        self.active.start().map_err(|e| self.explained(e))?;
        self.settle()?;
        let before = sent(&self.active);
        let Some(written) = written_by_repack(&repository).filter(|bytes| *bytes > 0) else { return Ok(None) };
        self.settle()?;
        Ok(Some((sent(&self.active) - before) / written as f64))
    }
}

fn entries_below(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let count = |entry: fs::DirEntry| 1 + if entry.file_type().is_ok_and(|kind| kind.is_dir()) { entries_below(&entry.path()) } else { 0 };
    entries.filter_map(Result::ok).map(count).sum()
}
