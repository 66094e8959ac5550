use std::time::Instant;
fn main() {
    let mut args = std::env::args().skip(1);
    let path = args.next().unwrap();
    let threads: usize = args.next().map_or(2, |t| t.parse().unwrap());
    let path_ = kernels::Path::detect().unwrap();
    let engine = kernels::Engine::new(path_, threads, false);
    let begun = Instant::now();
    let reader = quant::gguf::Reader::open(std::path::Path::new(&path)).unwrap();
    let opened = begun.elapsed();
    let model = quant::inference::Model::load(&reader, &engine).unwrap();
    let loaded = begun.elapsed();
    let mut s = model.session(2048);
    // greedy text
    let prompt: Vec<u32> = vec![504, 3575, 282, 4649, 314];
    let arg = |l: &[f32]| l.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32;
    let mut t = arg(s.next(&prompt));
    let mut out = vec![];
    for _ in 0..24 { out.push(t); t = arg(s.next(&[t])); }
    println!("{out:?}");
    let mut s1 = model.session(2048);
    let mut t = 0;
    for &p in &prompt { t = arg(s1.next(&[p])); }
    let mut out1 = vec![];
    for _ in 0..24 { out1.push(t); t = arg(s1.next(&[t])); }
    if out != out1 { println!("DIFFERS {out1:?}"); }
    // agreement of batch and token
    { let text: Vec<u32> = (0..100u32).map(|i| (i * 7919 + 13) % 49152).collect();
      s.truncate(0); let a = s.next(&text).to_vec(); s1.truncate(0); for t in &text[..99] { s1.next(&[*t]); } let b = s1.next(&text[99..]);
      let e = a.iter().zip(b).map(|(a,b)| (a-b).abs()).fold(0.0, f32::max); println!("max diff batch/token {e} of {:?}", &b[..3]); }
    println!("bandwidth {:.1} GB/s", kernels::bandwidth::gigabytes_per_second(&engine, 5));
    let prompt: Vec<u32> = (0..512u32).map(|i| (i * 7919 + 13) % 49152).collect();
    let mut best = f64::MAX;
    for _ in 0..4 { s.truncate(0); let b = Instant::now(); s.next(&prompt); best = best.min(b.elapsed().as_secs_f64()); }
    let pp = 512.0 / best;
    let mut times = vec![];
    for r in 0..3 { s.truncate(0); if r==0 {} for i in 0..128 { let b = Instant::now(); s.next(&[(i * 7919 + 13) % 49152]); times.push(b.elapsed().as_secs_f64()); } }
    times.sort_by(f64::total_cmp);
    let mean = times.iter().sum::<f64>() / times.len() as f64;
    println!("{path} {:?} {threads}t open {opened:?} load {loaded:?} {:.1} MB pp512 {pp:.0} tg128 {:.0} (median {:.0}) {:.1} GB/s", path_, model.bytes() as f64 / 1e6, 1.0 / mean, 1.0 / times[times.len()/2], model.bytes() as f64 / mean / 1e9);
}
