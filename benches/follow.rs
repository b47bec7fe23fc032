//! How soon a change is on the standby: coldspare's daemons and lsyncd, in turn, on the same home.
//!
//! A file counts from before it is written; a push from the time of the reference that it wrote. Both until the
//! standby's tree shows it, which with coldspare is after it is durable there, and with lsyncd isn't.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use coldspare_sim::load::{Load, Pusher, REPOSITORIES, Rates, Shape, percentile};
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
const LOAD_RATE: f64 = 20.0;
/// Repositories that the load goes to.
const LOADED: usize = 20;
/// LIMIT: how long a change may take until the measurement is given up.
pub(crate) const GIVE_UP: Duration = Duration::from_secs(60);

/// Measures what was asked for of it.
pub(crate) fn compare_all(settings: &Settings, has_lsyncd: bool) -> Result<Vec<Value>> {
    if !SECTIONS.iter().any(|section| settings.wants(section)) {
        return Ok(Vec::new());
    }
    let dir = settings.lasting_dir("follow")?;
    let home = Home::make(&dir)?;
    let mut rows = Rows::default();
    let at = dir.join("coldspare");
    fs::create_dir(&at)?;
    let pair = Pair::make(&home.path, &at)?;
    let receiver = pair.receive()?;
    let sender = pair.send()?;
    run(&mut pair.on_active(&["checkpoint", "--timeout", "300s"]))?;
    let many = settings.runs * settings.changes;
    let ours = Follower { tool: "coldspare", destination: &pair.destination, longest: GIVE_UP };
    follow(settings, &home, &ours, many, &mut rows)?;
    if settings.wants("lag") {
        lag(settings, &home, &pair, &mut rows)?;
    }
    drop((sender, receiver));
    if has_lsyncd {
        let at = dir.join("lsyncd");
        fs::create_dir(&at)?;
        let peer = Lsyncd::start(&home.path, &at)?;
        // A change takes it more than a second: fewer of them.
        let theirs = Follower { tool: "lsyncd", destination: &peer.destination, longest: settings.peer_patience };
        if let Err(e) = follow(settings, &home, &theirs, (many / 10).max(1), &mut rows) {
            println!("lsyncd gave out: {e}\n");
        }
    }
    Ok(vec![rows.print()])
}

/// A home with a repository that is pushed to alone, and those that the load goes to.
struct Home {
    path: PathBuf,
    alone: Mutex<Pusher>,
    load: Load,
}

impl Home {
    fn make(dir: &Path) -> Result<Home> {
        let path = dir.join("home");
        fs::create_dir(&path)?;
        home::make_loose(&path, LOOSE, SEED)?;
        let alone = Mutex::new(pusher(dir, &path)?);
        let shape = Shape { repositories: LOADED, seed: SEED, ..Shape::named("load") };
        let load = Load::new(&path, &dir.join("clones"), shape)?;
        Ok(Home { path, alone, load })
    }
}

/// A repository in the home that is pushed to alone.
pub(crate) fn pusher(dir: &Path, home: &Path) -> Result<Pusher> {
    Ok(Pusher::new(&dir.join("clone"), &home.join(REPOSITORIES).join("1000"), &Shape { seed: SEED, ..Shape::named("alone") }, 0)?)
}

/// Pushes; milliseconds from the time of the reference that it wrote until `destination`'s tree has it.
pub(crate) fn push_and_wait(pusher: &mut Pusher, home: &Path, destination: &Path, longest: Duration) -> Result<f64> {
    let reference = pusher.reference();
    let tip = pusher.push()?;
    let since = fs::metadata(&reference)?.modified()?;
    wait_for(&destination.join(reference.strip_prefix(home)?), tip.as_bytes(), longest)?;
    Ok(since.elapsed().unwrap_or_default().as_secs_f64() * 1000.0)
}

/// A tool that follows a home.
struct Follower<'a> {
    tool: &'static str,
    destination: &'a Path,
    /// LIMIT: how long a change may take until the measurement is given up.
    longest: Duration,
}

/// Measures a tool that follows `home`, with `many` changes of each kind.
fn follow(settings: &Settings, home: &Home, to: &Follower<'_>, many: usize, rows: &mut Rows) -> Result<()> {
    let tool = to.tool;
    let files = |what: &'static str, rows: &mut Rows| -> Result<()> {
        let taken: Result<Vec<f64>> = (0..many).map(|no| file(home, to, &format!("{what}-{tool}-{no}"))).collect();
        rows.add(what, tool, taken?);
        Ok(())
    };
    let pushes = |what: &'static str, rows: &mut Rows| -> Result<()> {
        let taken: Result<Vec<f64>> = (0..many).map(|no| push(home, to, no)).collect();
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
        let rate = under_load(home, || {
            files("file under load", rows)?;
            pushes("push under load", rows)
        })?;
        rows.notes.push(format!("{tool}: the load was {:.1} pushes a second", rate));
        let start = Instant::now();
        for (reference, tip) in home.load.tips() {
            wait_for(&to.destination.join(reference), tip.as_bytes(), to.longest)?;
        }
        rows.notes.push(format!("{tool}: all of the load was there {} ms after its end", start.elapsed().as_millis()));
    }
    Ok(())
}

/// Milliseconds until a small file is on the standby.
fn file(home: &Home, to: &Follower<'_>, name: &str) -> Result<f64> {
    let path = Path::new("shared/data/attachments/repository/1").join(name);
    std::thread::sleep(pause(name.len()));
    let content = format!("{name}\n").repeat(40);
    let start = Instant::now();
    fs::write(home.path.join(&path), &content)?;
    wait_for(&to.destination.join(&path), content.as_bytes(), to.longest)?;
    Ok(start.elapsed().as_secs_f64() * 1000.0)
}

/// Milliseconds until what a push wrote is on the standby.
fn push(home: &Home, to: &Follower<'_>, no: usize) -> Result<f64> {
    std::thread::sleep(pause(no));
    let mut pusher = home.alone.lock().map_err(|_| "a push panicked")?;
    push_and_wait(&mut pusher, &home.path, to.destination, to.longest)
}

/// So long that a change stands alone, and never in step with anything.
pub(crate) fn pause(no: usize) -> Duration {
    Duration::from_millis(20 + (no as u64 * 37) % 50)
}

/// Waits until a file begins with `content`.
pub(crate) fn wait_for(path: &Path, content: &[u8], longest: Duration) -> Result<()> {
    let start = Instant::now();
    while !fs::read(path).is_ok_and(|found| found.starts_with(content)) {
        if start.elapsed() > longest {
            return Err(format!("{} is not there after {longest:?}", path.display()).into());
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    Ok(())
}

/// Runs `work` while others push; how many pushes a second there were.
fn under_load(home: &Home, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let is_over = AtomicBool::new(false);
    let rates = Rates { pushes_per_second: LOAD_RATE, pushers: PUSHERS, ..Rates::default() };
    std::thread::scope(|scope| {
        let load = scope.spawn(|| home.load.run(&rates, Duration::MAX, &is_over));
        let worked = work();
        is_over.store(true, Ordering::Relaxed);
        let report = load.join().map_err(|_| "the load panicked")?;
        worked?;
        let report = report?;
        Ok(report.of("pushes").ms.len() as f64 / report.seconds)
    })
}

/// Lag as coldspare reports it, while pushes go on and after they end.
fn lag(settings: &Settings, home: &Home, pair: &Pair, rows: &mut Rows) -> Result<()> {
    let lag_ms = || -> Result<f64> {
        let status: Value = serde_json::from_str(&run(&mut pair.on_active(&["status", "--json"]))?)?;
        status["lag_ms"].as_f64().ok_or("no lag_ms in the status".into())
    };
    let mut seen = Vec::new();
    let rate = under_load(home, || {
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
        rate,
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

/// Threads that push.
const PUSHERS: usize = 4;
