//! SIGKILL, or a failing disk, at every call by which either side changes files.
//!
//! Five changes are sent, from a prepared state, again and again, with the receiver or the sender killed at its N-th
//! call, or with an error answered to it. What has to hold afterwards is in [`oracle`]: git is content with the raw tree,
//! recovery leads to the old tree or to the new one and to nothing else, what was acknowledged is there, an undisturbed
//! send makes both equal. By default a sample; `docs/testing.md` says how to sweep everything, and how to repeat one.

mod bench;
mod kept;
mod oracle;
mod scenario;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use coldspare_sim::supervise::{self, Fault, Plan};
use rustix::io::Errno;

use bench::{Bench, SIDES, Side};
use scenario::{SCENARIOS, Scenario};

/// How many points a sample has, unless `COLDSPARE_SWEEP` is a number.
const SAMPLE: usize = 200;
/// Of how many of them one is a failure and no kill.
const SAMPLE_ERRNO_EVERY: usize = 5;
/// Of how many calls one is failed in the long form, for each kind of failure.
const ERRNO_EVERY: usize = 20;
/// LIMIT: violations after which a sweep ends.
const VIOLATIONS_MAX: usize = 50;

const ERRNOS: [(&str, Errno); 4] = [("EIO", Errno::IO), ("ENOSPC", Errno::NOSPC), ("EMFILE", Errno::MFILE), ("EINTR", Errno::INTR)];

/// One run: who, what is sent, where it is hit, by what.
#[derive(Clone, Copy)]
struct Point {
    scenario: Scenario,
    side: Side,
    at: u64,
    fault: Fault,
}

#[derive(Default)]
struct Found {
    kills: AtomicUsize,
    errnos: AtomicUsize,
    /// Points behind the end: threads don't run in the same order each time.
    not_reached: AtomicUsize,
    violations: Mutex<Vec<String>>,
}

#[test]
fn whatever_call_is_the_last_the_standby_is_one_of_its_states() {
    let started = Instant::now();
    if let Some(why) = cannot_supervise() {
        return println!("skipped: {why}");
    }
    let wanted = std::env::var("COLDSPARE_SWEEP").unwrap_or_default();
    let benches = Mutex::new(Vec::new());
    let size = if wanted.is_empty() { Some(SAMPLE) } else { wanted.parse().ok() };
    let points = match wanted.as_str() {
        many if many == "all" || size.is_some() => {
            let counts = count(&benches);
            let total: usize = counts.values().sum();
            println!("{total} calls: {}", Told(&counts));
            size.map_or_else(|| everything(&counts), |size| sample(&counts, size))
        }
        one => vec![
            Point::parse(one)
                .unwrap_or_else(|| panic!("COLDSPARE_SWEEP={one}: no number, not `all`, and not like receiver:push:37[:EIO[+]]")),
        ],
    };
    let prepared = started.elapsed();
    let found = Found::default();
    in_parallel(points.len(), |n| {
        if found.violations.lock().unwrap().len() < VIOLATIONS_MAX {
            sweep(points[n], &benches, &found, points.len() == 1);
        }
        if (n + 1) % 500 == 0 {
            println!("{} of {} points, {:.0} s", n + 1, points.len(), started.elapsed().as_secs_f64());
        }
    });
    drop(benches);
    let violations = found.violations.into_inner().unwrap();
    println!(
        "swept {} kill points, {} errnos, {} violations ({} not reached; {:.1} s, of which {:.1} s to prepare)",
        found.kills.into_inner(),
        found.errnos.into_inner(),
        violations.len(),
        found.not_reached.into_inner(),
        started.elapsed().as_secs_f64(),
        prepared.as_secs_f64(),
    );
    assert!(violations.is_empty(), "repeat one with COLDSPARE_SWEEP=<the first word>\n{}", violations.join("\n"));
}

/// Hits one point and judges what is left.
fn sweep(point: Point, benches: &Mutex<Vec<Bench>>, found: &Found, is_alone: bool) {
    let judged = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let bench = take(benches, point.scenario);
        let run = bench.run(point.side, Some((point.at, point.fault)));
        let log = bench.log();
        let wrong = oracle::judge(&bench, &run);
        if is_alone {
            for (n, call) in run.calls.iter().enumerate() {
                println!("{:>5} {} {}", n + 1, call.name, call.path.display());
            }
            println!("{point} hit {:?}, acknowledged: {}\n{log}", run.hit, run.acknowledged);
        }
        benches.lock().unwrap().push(bench);
        (run.hit, wrong)
    }));
    let (hit, wrong) = match judged {
        Ok(judged) => judged,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
            (None, vec![format!("the sweep can't go on: {}", text.unwrap_or_default())])
        }
    };
    match point.fault {
        _ if hit.is_none() => &found.not_reached,
        Fault::Kill => &found.kills,
        Fault::Once(_) | Fault::FromThenOn(_) => &found.errnos,
    }
    .fetch_add(1, Ordering::Relaxed);
    if !wrong.is_empty() {
        let hit = hit.map_or("nothing".into(), |call| format!("{} {}", call.name, call.path.display()));
        let text = format!("{point} (hit {hit}):\n    {}", wrong.join("\n    "));
        println!("VIOLATION {text}");
        found.violations.lock().unwrap().push(text);
    }
}

/// How many calls each side makes in each scenario, undisturbed.
fn count(benches: &Mutex<Vec<Bench>>) -> BTreeMap<(Scenario, Side), usize> {
    let counts = Mutex::new(BTreeMap::new());
    in_parallel(SCENARIOS.len(), |n| {
        let bench = take(benches, SCENARIOS[n]);
        for side in SIDES {
            let run = bench.run(side, None);
            assert!(run.acknowledged, "{} undisturbed: {:?}\n{}", SCENARIOS[n].name(), run.violations, bench.log());
            let wrong = oracle::judge(&bench, &run);
            assert!(wrong.is_empty(), "{} undisturbed: {wrong:#?}", SCENARIOS[n].name());
            counts.lock().unwrap().insert((SCENARIOS[n], side), run.calls.len());
        }
        benches.lock().unwrap().push(bench);
    });
    counts.into_inner().unwrap()
}

/// A bench for the scenario that nobody uses, or a new one.
fn take(benches: &Mutex<Vec<Bench>>, scenario: Scenario) -> Bench {
    let free = {
        let mut benches = benches.lock().unwrap();
        benches.iter().position(|bench| bench.scenario == scenario).map(|at| benches.swap_remove(at))
    };
    free.unwrap_or_else(|| Bench::new(scenario))
}

/// Every call is killed at, and each kind of failure answered to one in [`ERRNO_EVERY`].
fn everything(counts: &BTreeMap<(Scenario, Side), usize>) -> Vec<Point> {
    let mut out = Vec::new();
    for (&(scenario, side), &calls) in counts {
        let at = |at: usize, fault| Point { scenario, side, at: at as u64, fault };
        out.extend((1..=calls).map(|n| at(n, Fault::Kill)));
        for (offset, fault) in failures().enumerate() {
            out.extend((1 + offset..=calls).step_by(ERRNO_EVERY).map(|n| at(n, fault)));
        }
    }
    out
}

/// Calls at equal distances over all scenarios and sides, shifted by `COLDSPARE_SEED`.
fn sample(counts: &BTreeMap<(Scenario, Side), usize>, size: usize) -> Vec<Point> {
    let seed = std::env::var("COLDSPARE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0_usize);
    println!("a sample with COLDSPARE_SEED={seed}");
    let total: usize = counts.values().sum();
    let spread = |wanted: usize, shift: usize| {
        let start = (seed.wrapping_mul(7919) + shift) % total;
        (0..wanted).map(move |n| (start + n * total / wanted) % total)
    };
    let locate = |mut n: usize, fault: Fault| {
        for (&(scenario, side), &calls) in counts {
            if n < calls {
                return Point { scenario, side, at: n as u64 + 1, fault };
            }
            n -= calls;
        }
        unreachable!("below the total")
    };
    let mut out: Vec<Point> = spread(size - size / SAMPLE_ERRNO_EVERY, 0).map(|n| locate(n, Fault::Kill)).collect();
    out.extend(spread(size / SAMPLE_ERRNO_EVERY, 31).zip(failures().cycle()).map(|(n, fault)| locate(n, fault)));
    // The scenarios one after the other: a bench is not made for one point.
    out.sort_by_key(|point| point.scenario);
    out
}

fn failures() -> impl Iterator<Item = Fault> + Clone {
    let lasting = ERRNOS[..2].iter().map(|&(_, errno)| Fault::FromThenOn(errno));
    ERRNOS.iter().map(|&(_, errno)| Fault::Once(errno)).chain(lasting)
}

/// Calls `work` with each number below `count`, from twice as many threads as there are processors: half of a run is waiting.
fn in_parallel(count: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(2, usize::from).saturating_mul(2).min(count.max(1));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= count {
                        return;
                    }
                    work(n);
                }
            });
        }
    });
}

fn cannot_supervise() -> Option<String> {
    let plan = Plan { below: Vec::new(), fault: None };
    match supervise::start(std::process::Command::new("true"), plan).and_then(supervise::Supervised::wait) {
        Ok(_) => None,
        Err(e) => Some(format!("seccomp user notification: {e}")),
    }
}

impl Point {
    fn parse(text: &str) -> Option<Point> {
        let mut parts = text.split(':');
        let side = parts.next().and_then(|name| SIDES.into_iter().find(|side| side.name() == name))?;
        let scenario = parts.next().and_then(|name| SCENARIOS.into_iter().find(|scenario| scenario.name() == name))?;
        let at = parts.next()?.parse().ok()?;
        let fault = match parts.next() {
            None => Fault::Kill,
            Some(text) => {
                let (name, fault): (_, fn(Errno) -> Fault) = match text.strip_suffix('+') {
                    Some(name) => (name, Fault::FromThenOn),
                    None => (text, Fault::Once),
                };
                fault(ERRNOS.iter().find(|(known, _)| *known == name)?.1)
            }
        };
        Some(Point { scenario, side, at, fault })
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.side.name(), self.scenario.name(), self.at)?;
        let name = |errno: Errno| ERRNOS.iter().find(|(_, known)| *known == errno).map_or("?", |(name, _)| name);
        match self.fault {
            Fault::Kill => Ok(()),
            Fault::Once(errno) => write!(f, ":{}", name(errno)),
            Fault::FromThenOn(errno) => write!(f, ":{}+", name(errno)),
        }
    }
}

struct Told<'a>(&'a BTreeMap<(Scenario, Side), usize>);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each = self.0.iter().map(|((scenario, side), calls)| format!("{}:{} {calls}", side.name(), scenario.name()));
        f.write_str(&each.collect::<Vec<_>>().join(", "))
    }
}
