// Runs an exported network (model.ts) on PPM images and prints its detections, one JSON object per image.
//
//   detect MODEL TORCHVISION_LIBRARY [--short-edge N --max-size M] [--bgr] IMAGE.ppm ...
//
// The options are the manifest's `preprocessing`. A scripted network takes all images in one batch, a traced one takes
// them one by one; the program sees which it has by the signature.

#include <dlfcn.h>
#include <torch/script.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

struct Options {
  std::string model, library;
  int64_t short_edge = 0, max_size = 0;  // 0: images keep their size
  bool bgr = false;
  std::vector<std::string> images;
};

struct Detections {
  at::Tensor boxes, scores, classes;  // (N, 4) pixels of the original image, (N,), (N,)
};

Options parse(int count, char** words) {
  Options options;
  std::vector<std::string> places;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const bool has_value = word == "--short-edge" || word == "--max-size";
    if (has_value && i + 1 == count) throw std::runtime_error(word + " needs a number");
    if (word == "--short-edge") options.short_edge = std::stoll(words[++i]);
    else if (word == "--max-size") options.max_size = std::stoll(words[++i]);
    else if (word == "--bgr") options.bgr = true;
    else places.push_back(word);
  }
  if (places.size() < 3)
    throw std::runtime_error("usage: detect MODEL TORCHVISION_LIBRARY [--short-edge N --max-size M] [--bgr] IMAGE.ppm ...");
  options.model = places[0];
  options.library = places[1];
  options.images.assign(places.begin() + 2, places.end());
  return options;
}

// torchvision's library registers torchvision::nms and torchvision::roi_align when it is loaded.
void load_operators(const std::string& library) {
  if (dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
}

// A binary PPM (P6, 8 bits) as (3, H, W) uint8 RGB.
at::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, largest = 0;
  file >> magic >> width >> height >> largest;
  if (!file || magic != "P6" || largest != 255) throw std::runtime_error(path + ": expected a P6 PPM of 8 bits without comments");
  file.get();
  at::Tensor pixels = torch::empty({height, width, 3}, torch::kUInt8);
  file.read(reinterpret_cast<char*>(pixels.data_ptr<uint8_t>()), pixels.numel());
  if (file.gcount() != pixels.numel()) throw std::runtime_error(path + ": the file ends before its last pixel");
  return pixels.permute({2, 0, 1}).contiguous();
}

// The network's input: short side resized to `short_edge` unless the long side would exceed `max_size`.
at::Tensor preprocess(const at::Tensor& image, const Options& options) {
  const int64_t height = image.size(1), width = image.size(2);
  at::Tensor result = image;
  if (options.short_edge > 0) {
    const double scale = double(options.short_edge) / std::min(height, width);
    double new_height = height < width ? options.short_edge : scale * height;
    double new_width = height < width ? scale * width : options.short_edge;
    const double longest = std::max(new_height, new_width);
    if (longest > options.max_size) {
      const double shrink = options.max_size / longest;
      new_height *= shrink;
      new_width *= shrink;
    }
    const std::vector<int64_t> size = {int64_t(new_height + 0.5), int64_t(new_width + 0.5)};
    if (size[0] != height || size[1] != width)
      result = at::_upsample_bilinear2d_aa(image.unsqueeze(0), size, /*align_corners=*/false).squeeze(0);
  }
  return options.bgr ? result.flip({0}) : result;
}

std::vector<Detections> run_batch(
    torch::jit::Module& network, const c10::List<at::Tensor>& images, const c10::List<at::Tensor>& sizes) {
  std::vector<Detections> found;
  const c10::IValue outputs = network.forward({images, sizes});
  for (const c10::IValue& one : outputs.toListRef()) {
    const auto prediction = one.toGenericDict();
    found.push_back({prediction.at("boxes").toTensor(), prediction.at("scores").toTensor(), prediction.at("classes").toTensor()});
  }
  return found;
}

std::vector<Detections> run_one_by_one(
    torch::jit::Module& network, const c10::List<at::Tensor>& images, const c10::List<at::Tensor>& sizes) {
  std::vector<Detections> found;
  for (size_t i = 0; i < images.size(); ++i) {
    const auto outputs = network.forward({images.get(i), sizes.get(i)}).toTuple()->elements().vec();
    found.push_back({outputs.at(0).toTensor(), outputs.at(1).toTensor(), outputs.at(2).toTensor()});
  }
  return found;
}

void print(const std::string& image, const Detections& found) {
  std::printf("{\"image\": \"%s\", \"detections\": [", image.c_str());
  for (int64_t i = 0; i < found.boxes.size(0); ++i) {
    const auto box = found.boxes[i];
    std::printf("%s{\"box\": [%.9g, %.9g, %.9g, %.9g], \"score\": %.9g, \"class\": %ld}", i ? ", " : "",
                box[0].item<double>(), box[1].item<double>(), box[2].item<double>(), box[3].item<double>(),
                found.scores[i].item<double>(), long(found.classes[i].item<int64_t>()));
  }
  std::printf("]}\n");
}

void run(const Options& options) {
  const c10::InferenceMode guard;
  load_operators(options.library);
  torch::jit::Module network = torch::jit::load(options.model, torch::kCPU);
  c10::List<at::Tensor> images, sizes;
  for (const auto& path : options.images) {
    const at::Tensor image = read_ppm(path);
    images.push_back(preprocess(image, options));
    sizes.push_back(torch::tensor({image.size(1), image.size(2)}, torch::kInt64));
  }
  const auto& arguments = network.get_method("forward").function().getSchema().arguments();
  const bool scripted = arguments.at(1).type()->kind() == c10::TypeKind::ListType;
  const auto found = scripted ? run_batch(network, images, sizes) : run_one_by_one(network, images, sizes);
  for (size_t i = 0; i < found.size(); ++i) print(options.images[i], found[i]);
}

int main(int count, char** words) {
  try {
    run(parse(count, words));
  } catch (const std::exception& error) {
    std::cerr << "detect: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
