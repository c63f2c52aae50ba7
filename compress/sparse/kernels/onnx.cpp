// The kernels as operators of ONNX Runtime: BlockSparseLinear and BitmapSparseLinear of the domain hf_compress.
//
// ONNX Runtime calls RegisterCustomOps when a session is given this library. Its C interface is a table of functions to
// which versions only append, so what is used of it is told here by number, and no header is needed. Products run on the
// threads of the session. What a graph holds is looked at once, when its session opens: indices that point outside are
// refused there, and products follow them unasked.

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "sparse.h"

namespace {

using Handle = void*;  // something of ONNX Runtime's own
using Status = void*;  // null where all went well

constexpr uint32_t VERSION = 17;     // of the interface: the first that runs loops on a session's threads
constexpr uint32_t OP_VERSION = 16;  // of what an operator tells: the first whose functions return a status

enum Slot {
    CREATE_STATUS = 0,
    CREATE_DOMAIN = 26,
    ADD_TO_DOMAIN = 27,
    ADD_DOMAIN = 28,
    TENSOR_DATA = 51,
    ELEMENT_TYPE = 60,
    DIMENSION_COUNT = 61,
    DIMENSIONS = 62,
    TYPE_AND_SHAPE = 65,
    ATTRIBUTE_INT = 86,
    INPUT = 90,
    OUTPUT = 91,
    RELEASE_TYPE_AND_SHAPE = 99,
    INPUT_COUNT = 230,
    CONSTANT_INPUT = 249,
    PARALLEL_FOR = 274,
};

enum Type { ANY = 0, FLOAT = 1, INT8 = 3, INT16 = 5, INT32 = 6 };

struct Api {
    void* slots[PARALLEL_FOR + 1];

    template <typename... Given>
    Status call(Slot slot, Given... given) const {
        return reinterpret_cast<Status (*)(Given...)>(slots[slot])(given...);
    }

    // The same where nothing is expected to go wrong.
    template <typename... Given>
    void must(Slot slot, Given... given) const {
        if (call(slot, given...)) throw std::runtime_error("ONNX Runtime refused call " + std::to_string(slot));
    }

    Status failed(const std::string& message) const {
        constexpr int FAIL = 1;
        return call(CREATE_STATUS, FAIL, message.c_str());
    }
};

struct Base {
    const Api* (*api)(uint32_t version);
};

struct Tensor {
    void* data = nullptr;
    std::vector<int64_t> shape;
    int type = ANY;

    Tensor(const Api& api, const void* value) {
        Handle told = nullptr;
        size_t count = 0;
        api.must(TENSOR_DATA, const_cast<void*>(value), &data);
        api.must(TYPE_AND_SHAPE, value, &told);
        api.must(ELEMENT_TYPE, const_cast<const void*>(told), &type);
        api.must(DIMENSION_COUNT, const_cast<const void*>(told), &count);
        shape.resize(count);
        api.must(DIMENSIONS, const_cast<const void*>(told), shape.data(), count);
        reinterpret_cast<void (*)(Handle)>(api.slots[RELEASE_TYPE_AND_SHAPE])(told);
    }

    template <typename T>
    const T* as() const {
        return static_cast<const T*>(data);
    }

    long count() const {
        long all = 1;
        for (int64_t size : shape) all *= size;
        return all;
    }
};

void expect(bool holds, const char* what) {
    if (!holds) throw std::runtime_error(what);
}

// Starts of entries ascend from 0 to the number of entries.
void expect_starts(const Tensor& starts, long rows, long entries) {
    const int32_t* at = starts.as<int32_t>();
    expect(starts.count() == rows + 1 && at[0] == 0 && at[rows] == entries, "starts don't span the entries");
    for (long i = 0; i < rows; ++i) expect(at[i] <= at[i + 1], "starts don't ascend");
}

// A matrix as a graph holds it: the constant inputs after x, the last of which may be a bias.
struct Matrix {
    long inputs, outputs = 0;
    const float* bias = nullptr;

    virtual ~Matrix() = default;
    virtual void multiply_by(const Product& product, const Runner& run) const = 0;

    explicit Matrix(long inputs) : inputs(inputs) { expect(inputs > 0, "no inputs"); }

    void take_bias(const std::vector<Tensor>& held, size_t without) {
        if (held.size() <= without) return;
        expect(held[without].count() == outputs, "a bias of another size");
        bias = held[without].as<float>();
    }
};

struct BlockMatrix : Matrix {
    static constexpr const char* NAME = "BlockSparseLinear";
    static constexpr Type TYPES[] = {FLOAT, INT32, INT32, INT16, INT8, FLOAT, INT32, FLOAT};
    Blocks held;

    BlockMatrix(const std::vector<Tensor>& t, long inputs) : Matrix(inputs) {
        outputs = t[4].count();
        const long slots = rounded_up(outputs, 4), entries = t[2].count() / 4, places = ceiling(inputs, 4);
        expect(outputs > 0 && inputs <= 65536, "more inputs than sums can bear");
        expect(t[0].count() == slots && t[5].count() == outputs, "tensors of other sizes");
        expect(t[2].count() == entries * 4 && t[3].count() == entries * 16, "places and codes of other sizes");
        expect_starts(t[1], slots / 4, entries);
        std::vector<bool> seen(slots);
        const int32_t* order = t[0].as<int32_t>();
        for (long i = 0; i < slots; ++i) {
            expect(order[i] >= 0 && order[i] < slots && order[i] / CHUNK == i / CHUNK, "an output far from its place");
            expect(!seen[order[i]], "an output twice");
            seen[order[i]] = true;
        }
        for (long i = 0; i < entries * 4; ++i) expect(t[2].as<uint16_t>()[i] < places, "a block past the inputs");
        held = {order, t[1].as<int32_t>(), t[2].as<uint16_t>(), t[3].as<int8_t>(), t[4].as<float>(), t[5].as<int32_t>()};
        take_bias(t, 6);
    }

    // The first product of few rows lays the blocks out for such.
    void multiply_by(const Product& product, const Runner& run) const override {
        if (product.rows > FewRows::MOST || best_path() != WITH_AVX512)
            return multiply(product, held, best_path(), run);
        std::call_once(once, [&] { few = std::make_unique<FewRows>(held, inputs, outputs); });
        multiply(product, held, *few, run);
    }

  private:
    mutable std::once_flag once;
    mutable std::unique_ptr<FewRows> few;
};

struct BitmapMatrix : Matrix {
    static constexpr const char* NAME = "BitmapSparseLinear";
    static constexpr Type TYPES[] = {FLOAT, INT32, INT32, ANY, FLOAT};
    Bitmap held;

    BitmapMatrix(const std::vector<Tensor>& t, long inputs) : Matrix(inputs) {
        const long words = ceiling(inputs, 32), entries = t[2].count();
        outputs = t[0].count() / words;
        expect(outputs > 0 && t[0].count() == outputs * words, "bits of another size");
        expect(t[2].type == FLOAT || t[2].type == INT16, "values that are neither float nor halves");
        expect_starts(t[1], outputs, entries);
        const uint32_t* bits = t[0].as<uint32_t>();
        const int32_t* starts = t[1].as<int32_t>();
        for (long n = 0; n < outputs; ++n) {
            long count = 0;
            for (long w = 0; w < words; ++w) count += __builtin_popcount(bits[n * words + w]);
            expect(count == starts[n + 1] - starts[n], "rows that don't begin where their bits say");
            expect(!(inputs % 32) || !(bits[(n + 1) * words - 1] >> inputs % 32), "bits past the inputs");
        }
        held = {bits, starts, t[2].data, t[2].type == INT16, entries};
        take_bias(t, 3);
    }

    void multiply_by(const Product& product, const Runner& run) const override {
        multiply(product, held, best_path(), run);
    }
};

// An operator of a session: its matrix, and the interface through which it is called.
struct Kernel {
    const Api& api;
    std::unique_ptr<Matrix> matrix;

    void compute(Handle context) const {
        const void* given = nullptr;
        api.must(INPUT, const_cast<const void*>(context), size_t{0}, &given);
        const Tensor x(api, given);
        std::vector<int64_t> shape = x.shape;
        expect(!shape.empty() && shape.back() == matrix->inputs, "an input of another width");
        shape.back() = matrix->outputs;
        void* result = nullptr;
        void* y = nullptr;
        api.must(OUTPUT, context, size_t{0}, const_cast<const int64_t*>(shape.data()), shape.size(), &result);
        api.must(TENSOR_DATA, result, &y);
        const long rows = x.count() / matrix->inputs;
        if (!rows) return;
        const auto run = [&](long parts, const std::function<void(long)>& part) {
            if (parts == 1) return part(0);
            void (*one)(void*, size_t) = [](void* part, size_t index) {
                (*static_cast<const std::function<void(long)>*>(part))(static_cast<long>(index));
            };
            void* data = const_cast<std::function<void(long)>*>(&part);
            api.must(PARALLEL_FOR, const_cast<const void*>(context), one, size_t(parts), size_t{0}, data);
        };
        const Product product{x.as<float>(), static_cast<float*>(y), matrix->bias, rows, matrix->inputs, matrix->outputs};
        matrix->multiply_by(product, run);
    }
};

// What ONNX Runtime asks of an operator, in the order in which it asks.
struct Operator {
    uint32_t version = OP_VERSION;
    Handle (*create_plainly)(const Operator*, const Api*, const void*) = nullptr;
    const char* (*name)(const Operator*);
    const char* (*provider)(const Operator*) = [](const Operator*) -> const char* { return nullptr; };
    int (*input_type)(const Operator*, size_t);
    size_t (*input_count)(const Operator*);
    int (*output_type)(const Operator*, size_t) = [](const Operator*, size_t) -> int { return FLOAT; };
    size_t (*output_count)(const Operator*) = [](const Operator*) -> size_t { return 1; };
    void (*compute_plainly)(void*, Handle) = nullptr;
    void (*destroy)(void*) = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    int (*input_kind)(const Operator*, size_t);
    int (*output_kind)(const Operator*, size_t) = [](const Operator*, size_t) { return 0; };
    int (*input_memory)(const Operator*, size_t) = [](const Operator*, size_t) { return 0; };
    int (*variadic[4])(const Operator*) = {one, one, one, one};
    Status (*create)(const Operator*, const Api*, const void*, void**);
    Status (*compute)(void*, Handle) = [](void* kernel, Handle context) -> Status {
        const Kernel& self = *static_cast<const Kernel*>(kernel);
        try {
            self.compute(context);
            return nullptr;
        } catch (const std::exception& error) {
            return self.api.failed(std::string("hf_compress: ") + error.what());
        }
    };
    void* infer_shape = nullptr;

    static int one(const Operator*) { return 1; }
};

template <typename M>
Status create(const Operator*, const Api* api, const void* info, void** kernel) {
    try {
        size_t count = 0;
        int64_t inputs = 0;
        api->must(INPUT_COUNT, info, &count);
        api->must(ATTRIBUTE_INT, info, "inputs", &inputs);
        std::vector<Tensor> held;
        for (size_t i = 1; i < count; ++i) {
            int constant = 0;
            const void* value = nullptr;
            api->must(CONSTANT_INPUT, info, i, &constant, &value);
            expect(constant, "a matrix that is no constant");
            held.emplace_back(*api, value);
        }
        *kernel = new Kernel{*api, std::make_unique<M>(held, static_cast<long>(inputs))};
        return nullptr;
    } catch (const std::exception& error) {
        return api->failed(std::string(M::NAME) + ": " + error.what());
    }
}

template <typename M>
Operator* the_operator() {
    static Operator self = [] {
        constexpr size_t COUNT = sizeof(M::TYPES) / sizeof(Type);
        Operator made;
        made.name = [](const Operator*) { return M::NAME; };
        made.input_type = [](const Operator*, size_t index) { return static_cast<int>(M::TYPES[index]); };
        made.input_count = [](const Operator*) { return COUNT; };
        made.input_kind = [](const Operator*, size_t index) { return index + 1 == COUNT ? 1 : 0; };  // 1: may be absent
        made.create = create<M>;
        return made;
    }();
    return &self;
}

}  // namespace

extern "C" Status RegisterCustomOps(Handle options, const Base* base) {
    const Api* api = base->api(VERSION);
    if (!api) return base->api(1)->failed("hf_compress needs ONNX Runtime 1.17 or later");
    static Handle domain = nullptr;
    if (!domain) {
        if (Status status = api->call(CREATE_DOMAIN, "hf_compress", &domain)) return status;
        for (Operator* one : {the_operator<BlockMatrix>(), the_operator<BitmapMatrix>()})
            if (Status status = api->call(ADD_TO_DOMAIN, domain, const_cast<const Operator*>(one))) return status;
    }
    return api->call(ADD_DOMAIN, options, domain);
}
