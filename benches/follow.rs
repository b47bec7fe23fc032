//! How soon a change is on the standby: coldspare's daemons and lsyncd, in turn, on the same home.
//!
//! A file counts from before it is written; a push from the time of the reference that it wrote. Both until the
//! standby's tree shows it, which with coldspare is after it is durable there, and with lsyncd isn't.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::Settings;
use crate::home::{self, SEED};
use crate::pair::{Lsyncd, Pair};
use crate::report::{Result, figure, run};

/// The sections that are of this part.
pub(crate) const SECTIONS: [&str; 4] = ["file", "push", "load", "lag"];

/// What stands around that isn't written.
const LOOSE: u64 = 20_000;
/// Pushes a second of the load.
const LOAD_RATE: u64 = 20;
/// Repositories that the load goes to.
const LOADED: usize = 20;
/// Commits of one push.
const COMMITS: usize = 5;
/// LIMIT: how long a change may take until the measurement is given up.
const GIVE_UP: Duration = Duration::from_secs(60);

/// Measures what was asked for of it.
pub(crate) fn compare_all(settings: &Settings, has_lsyncd: bool) -> Result<Vec<Value>> {
    if !SECTIONS.iter().any(|section| settings.wants(section)) {
        return Ok(Vec::new());
    }
    let dir = tempfile::Builder::new().prefix("coldspare-follow-").tempdir_in(&settings.dir)?;
    let home = Home::make(dir.path())?;
    let mut rows = Rows::default();
    let at = dir.path().join("coldspare");
    fs::create_dir(&at)?;
    let pair = Pair::make(&home.path, &at)?;
    let receiver = pair.receive()?;
    let sender = pair.send()?;
    run(&mut pair.on_active(&["checkpoint", "--timeout", "300s"]))?;
    let many = settings.runs * settings.changes;
    follow(settings, &home, &pair.destination, "coldspare", many, &mut rows)?;
    if settings.wants("lag") {
        lag(settings, &home, &pair, &mut rows)?;
    }
    drop((sender, receiver));
    if has_lsyncd {
        let at = dir.path().join("lsyncd");
        fs::create_dir(&at)?;
        let peer = Lsyncd::start(&home.path, &at)?;
        // A change takes it more than a second: fewer of them.
        if let Err(e) = follow(settings, &home, &peer.destination, "lsyncd", many / 10, &mut rows) {
            println!("lsyncd gave out: {e}\n");
        }
    }
    Ok(vec![rows.print()])
}

/// A home with repositories to push to, and their clones.
struct Home {
    path: PathBuf,
    clones: Vec<Pusher>,
}

/// A clone with commits that are still to be pushed.
pub(crate) struct Pusher {
    path: PathBuf,
    bare: PathBuf,
    /// Below the home.
    pub(crate) reference: String,
    commits: Vec<String>,
    next: AtomicU64,
}

impl Home {
    /// The first repository is pushed to alone, the others by the load.
    fn make(dir: &Path) -> Result<Home> {
        let path = dir.join("home");
        fs::create_dir(&path)?;
        home::make_loose(&path, LOOSE, SEED)?;
        let clones: Result<Vec<Pusher>> = (0..=LOADED).map(|no| Pusher::make(dir, &path, no)).collect();
        Ok(Home { path, clones: clones? })
    }
}

impl Pusher {
    pub(crate) fn make(dir: &Path, home: &Path, no: usize) -> Result<Pusher> {
        let name = format!("shared/data/repositories/{}", 1000 + no);
        let (bare, path) = (home.join(&name), dir.join(format!("clone-{no}")));
        run(Command::new("git").args(["init", "-q", "--bare"]).arg(&bare))?;
        run(Command::new("git").args(["init", "-q", "--bare"]).arg(&path))?;
        // Enough for the longest run.
        let commits = home::commit_chain(&path, PUSHES_MAX * COMMITS)?;
        Ok(Pusher { path, bare, reference: format!("{name}/refs/heads/main"), commits, next: AtomicU64::new(0) })
    }

    /// Pushes the next commits; the commit that is the tip now, and when it became that.
    pub(crate) fn push(&self) -> Result<(&str, SystemTime)> {
        let next = self.next.fetch_add(1, Ordering::Relaxed) as usize;
        let tip = self.commits.get((next + 1) * COMMITS - 1).ok_or("no commits are left to be pushed")?;
        run(Command::new("git").arg("-C").arg(&self.path).args(["push", "-q"]).arg(&self.bare).arg(format!("{tip}:refs/heads/main")))?;
        let since = fs::metadata(self.bare.join("refs/heads/main"))?.modified()?;
        Ok((tip, since))
    }

    /// What was pushed last.
    fn tip(&self) -> &str {
        let pushed = self.next.load(Ordering::Relaxed) as usize;
        self.commits.get((pushed * COMMITS).wrapping_sub(1)).map_or("", |tip| tip)
    }
}

/// Measures a tool that follows `home` to `destination`, with `many` changes of each kind.
fn follow(settings: &Settings, home: &Home, destination: &Path, tool: &'static str, many: usize, rows: &mut Rows) -> Result<()> {
    let files = |what: &'static str, rows: &mut Rows| -> Result<()> {
        let taken: Result<Vec<f64>> = (0..many).map(|no| file(home, destination, &format!("{what}-{tool}-{no}"))).collect();
        rows.add(what, tool, taken?);
        Ok(())
    };
    let pushes = |what: &'static str, rows: &mut Rows| -> Result<()> {
        let taken: Result<Vec<f64>> = (0..many).map(|no| push(home, destination, no)).collect();
        rows.add(what, tool, taken?);
        Ok(())
    };
    if settings.wants("file") {
        files("file", rows)?;
    }
    if settings.wants("push") {
        pushes("push", rows)?;
    }
    if settings.wants("load") {
        let pushed = under_load(home, || {
            files("file under load", rows)?;
            pushes("push under load", rows)
        })?;
        rows.notes.push(format!("{tool}: the load was {:.1} pushes a second", pushed.rate));
        let start = Instant::now();
        for clone in &home.clones[1..] {
            wait_for(&destination.join(&clone.reference), clone.tip().as_bytes())?;
        }
        rows.notes.push(format!("{tool}: all of the load was there {} ms after its end", start.elapsed().as_millis()));
    }
    Ok(())
}

/// Milliseconds until a small file is on the standby.
fn file(home: &Home, destination: &Path, name: &str) -> Result<f64> {
    let path = Path::new("shared/data/attachments/repository/1").join(name);
    std::thread::sleep(pause(name.len()));
    let content = format!("{name}\n").repeat(40);
    let start = Instant::now();
    fs::write(home.path.join(&path), &content)?;
    wait_for(&destination.join(&path), content.as_bytes())?;
    Ok(start.elapsed().as_secs_f64() * 1000.0)
}

/// Milliseconds until what a push wrote is on the standby.
fn push(home: &Home, destination: &Path, no: usize) -> Result<f64> {
    std::thread::sleep(pause(no));
    let (tip, since) = home.clones[0].push()?;
    wait_for(&destination.join(&home.clones[0].reference), tip.as_bytes())?;
    Ok(since.elapsed().unwrap_or_default().as_secs_f64() * 1000.0)
}

/// So long that a change stands alone, and never in step with anything.
pub(crate) fn pause(no: usize) -> Duration {
    Duration::from_millis(20 + (no as u64 * 37) % 50)
}

/// Waits until a file begins with `content`.
pub(crate) fn wait_for(path: &Path, content: &[u8]) -> Result<()> {
    let start = Instant::now();
    while !fs::read(path).is_ok_and(|found| found.starts_with(content)) {
        if start.elapsed() > GIVE_UP {
            return Err(format!("{} is not there after {GIVE_UP:?}", path.display()).into());
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    Ok(())
}

struct Load {
    /// Pushes a second.
    rate: f64,
}

/// Runs `work` while others push.
fn under_load(home: &Home, work: impl FnOnce() -> Result<()>) -> Result<Load> {
    let (is_over, pushed) = (AtomicBool::new(false), AtomicU64::new(0));
    let start = Instant::now();
    let (worked, failed) = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..PUSHERS)
            .map(|thread| {
                let (is_over, pushed) = (&is_over, &pushed);
                scope.spawn(move || -> std::result::Result<(), String> {
                    let mine: Vec<&Pusher> = home.clones[1..].iter().skip(thread).step_by(PUSHERS).collect();
                    for no in 0.. {
                        let due = start + Duration::from_micros(1_000_000 * PUSHERS as u64 / LOAD_RATE * no as u64);
                        std::thread::sleep(due.saturating_duration_since(Instant::now()));
                        if is_over.load(Ordering::Relaxed) {
                            break;
                        }
                        mine[no % mine.len()].push().map_err(|e| e.to_string())?;
                        pushed.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let worked = work();
        is_over.store(true, Ordering::Relaxed);
        let failed = threads.into_iter().find_map(|thread| thread.join().map_or(Some("a pusher panicked".into()), |r| r.err()));
        (worked, failed)
    });
    worked?;
    match failed {
        Some(e) => Err(e.into()),
        None => Ok(Load { rate: pushed.into_inner() as f64 / start.elapsed().as_secs_f64() }),
    }
}

/// Lag as coldspare reports it, while pushes go on and after they end.
fn lag(settings: &Settings, home: &Home, pair: &Pair, rows: &mut Rows) -> Result<()> {
    let lag_ms = || -> Result<f64> {
        let status: Value = serde_json::from_str(&run(&mut pair.on_active(&["status", "--json"]))?)?;
        status["lag_ms"].as_f64().ok_or("no lag_ms in the status".into())
    };
    let mut seen = Vec::new();
    let load = under_load(home, || {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(settings.seconds) {
            seen.push(lag_ms()?);
            std::thread::sleep(Duration::from_millis(500));
        }
        Ok(())
    })?;
    let end = Instant::now();
    while lag_ms()? > 0.0 {
        std::thread::sleep(Duration::from_millis(10));
        if end.elapsed() > GIVE_UP {
            let status = run(&mut pair.on_active(&["status", "--json"]))?;
            return Err(format!("the lag doesn't return to 0: {status}").into());
        }
    }
    rows.notes.push(format!(
        "lag: {} s at {:.1} pushes a second; 0 again {} ms after the end",
        settings.seconds,
        load.rate,
        end.elapsed().as_millis()
    ));
    rows.add("lag under load", "coldspare", seen);
    Ok(())
}

/// Milliseconds by what was measured and with which tool.
#[derive(Default)]
struct Rows {
    rows: Vec<(&'static str, &'static str, Vec<f64>)>,
    notes: Vec<String>,
}

impl Rows {
    fn add(&mut self, what: &'static str, tool: &'static str, mut ms: Vec<f64>) {
        ms.sort_by(f64::total_cmp);
        eprintln!("{what}, {tool}: p50 {} ms of {}", figure(percentile(&ms, 50)), ms.len());
        self.rows.push((what, tool, ms));
    }

    fn print(&self) -> Value {
        println!("| what, ms | tool | p50 | p95 | p99 | highest | of |\n|---|---|---|---|---|---|---|");
        for (what, tool, ms) in &self.rows {
            let [p50, p95, p99, p100] = [50, 95, 99, 100].map(|p| figure(percentile(ms, p)));
            println!("| {what} | {tool} | {p50} | {p95} | {p99} | {p100} | {} |", ms.len());
        }
        println!();
        self.notes.iter().for_each(|note| println!("{note}"));
        println!();
        let rows: Vec<Value> = self.rows.iter().map(|(what, tool, ms)| json!({"what": what, "tool": tool, "ms": ms})).collect();
        json!({"home": "follow", "rows": rows, "notes": self.notes})
    }
}

/// Of sorted values the lowest that `percent` of them don't exceed.
pub(crate) fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

/// LIMIT: pushes to one repository.
const PUSHES_MAX: usize = 1_500;
/// Threads that push.
const PUSHERS: usize = 4;
