use std::time::Instant;
fn main() {
    let mut args = std::env::args().skip(1);
    let path = args.next().unwrap();
    let threads: usize = args.next().map_or(2, |t| t.parse().unwrap());
    let n: u32 = args.next().map_or(60, |t| t.parse().unwrap());
    let engine = kernels::Engine::new(kernels::Path::detect().unwrap(), threads, false);
    let reader = quant::gguf::Reader::open(std::path::Path::new(&path)).unwrap();
    let b = Instant::now();
    let model = quant::inference::Model::load(&reader, &engine).unwrap();
    let l = b.elapsed();
    let mut s = model.session(2048);
    let mut times = vec![];
    for i in 0..n { let b = Instant::now(); s.next(&[(i * 7919 + 13) % 49152]); times.push(b.elapsed().as_secs_f64()); }
    times.sort_by(f64::total_cmp);
    let prompt: Vec<u32> = (0..256u32).map(|i| (i * 7919 + 13) % 49152).collect();
    s.truncate(0); s.next(&prompt);
    s.truncate(0); let b = Instant::now(); s.next(&prompt); let p = b.elapsed().as_secs_f64();
    println!("load {l:?} decode min {:.2} ms p25 {:.2} median {:.2} ms = {:.1} GB/s at best; prompt 256: {:.0} tok/s; bandwidth {:.1}", times[0]*1e3, times[times.len()/4]*1e3, times[times.len()/2]*1e3, model.bytes() as f64/times[0]/1e9, 256.0/p,
      kernels::bandwidth::gigabytes_per_second(&engine, 2));
}
